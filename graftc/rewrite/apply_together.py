"""Together: the second of two sites reads what the first reads; its own norm folds into its linears."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from graftc.diagnostics import fail
from graftc.program.program import Program
from graftc.program.roles import LINEARS
from graftc.rewrite.apply_common import find_call, mark, stream_of
from graftc.rewrite.edits import Edit, Fold
from graftc.rewrite.tree import set_module, shallow


def run_together(root: fx.GraphModule, program: Program, edit: Edit, on_meta: bool) -> None:
    """Rewire the second call; each branch goes on adding to the residual stream by itself."""
    first, second = edit.sites
    _, call = find_call(root, edit.graph, first.node)
    _, other = find_call(root, edit.graph, second.node)
    index = stream_of(other, second)
    given = call.args[stream_of(call, first)]
    other.args = (*other.args[:index], given, *other.args[index + 1 :])
    mark(other, edit, edit.name)
    if edit.fold is not None:
        _fold(root, program, edit, edit.fold)


def _fold(root: fx.GraphModule, program: Program, edit: Edit, fold: Fold) -> None:
    """W · (s z + t) for W · (s₂ / s₁ · (s₁ z + t₁ − t₁) + t₂): the linear on the first norm's output."""
    scale, shift = _between(program, edit, fold)
    for weight_name, bias_name, transposed in fold.weights:
        path, _, leaf = weight_name.rpartition(".")
        weight = program.root.get_parameter(weight_name).detach()
        columns = scale.unsqueeze(1) if transposed else scale
        moved = shift.to(weight) @ (weight if transposed else weight.t())
        module = shallow(root.get_submodule(path))
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(weight * columns.to(weight), old.requires_grad)
        if bias_name is not None:
            bias = program.root.get_parameter(bias_name)
            module._parameters[bias_name.rpartition(".")[2]] = nn.Parameter(
                bias.detach() + moved, bias.requires_grad
            )
        elif fold.first[1] is not None or fold.second[1] is not None:
            add_bias(module, leaf, nn.Parameter(moved, old.requires_grad))
        if isinstance(module, fx.GraphModule):
            module.recompile()
        set_module(root, path, module)


def _between(program: Program, edit: Edit, fold: Fold) -> tuple[Tensor, Tensor]:
    """Scale and shift with norm₂(x) = scale · norm₁(x) + shift."""
    names = [n for n in (*fold.first, *fold.second) if n is not None]
    like = program.root.get_parameter(fold.weights[0][0]).detach()
    width = program.root.get_parameter(names[0]).shape[0] if names else like.shape[-1]

    def tensor(name: str | None, otherwise: float) -> Tensor:
        if name is None:
            return torch.full((width,), otherwise, dtype=torch.float64, device=like.device)
        return program.root.get_parameter(name).detach().double()

    scale1, shift1 = tensor(fold.first[0], 1.0), tensor(fold.first[1], 0.0)
    scale2, shift2 = tensor(fold.second[0], 1.0), tensor(fold.second[1], 0.0)
    if not scale1.is_meta and bool(((scale1 == 0) & (scale2 != 0)).any()):
        fail(
            "G454",
            f"the norm before {edit.sites[0].path} has a scale of zero, which no linear can undo",
            span=edit.rule.edit.span,
            site=edit.sites[0].path,
        )
    scale = torch.where(scale1 == 0, torch.zeros_like(scale1), scale2 / scale1)
    return scale, shift2 - scale * shift1


def add_bias(module: nn.Module, weight: str, bias: nn.Parameter) -> None:
    """Give a linear without a bias one: in its parameters, and in the call of its op."""
    assert isinstance(module, fx.GraphModule)
    module._parameters["bias"] = bias
    for node in module.graph.nodes:
        if node.target in LINEARS and node.args[1].target == weight:
            with module.graph.inserting_before(node):
                got = module.graph.get_attr("bias")
            got.meta["val"] = torch.empty_like(bias, device="meta")
            node.args = (*node.args[:2], got)
            return
    raise AssertionError(f"no linear of {weight}")
