"""`fold(n)`, made: the mean taken out of the stream's writers, scale and shift moved into the norm's readers."""

from __future__ import annotations

from torch import Tensor, fx, nn

from graftc.program.program import Program
from graftc.rewrite.apply_together import add_bias
from graftc.rewrite.stream import StreamFold


def fold_stream(root: fx.GraphModule, program: Program, fold: StreamFold) -> None:
    """Change the weights on the student's own modules; sums are made in float64."""
    made: dict[int, Tensor] = {}
    for name, axis in fold.writers:
        holder, leaf = _holder(root, name)
        tensors = holder._parameters if leaf in holder._parameters else holder._buffers
        old = tensors[leaf]
        assert old is not None
        if id(old) not in made:  # a weight that several writers share stays one
            wide = old.detach().double()
            made[id(old)] = _like(old, wide - wide.mean(dim=axis, keepdim=True))
        tensors[leaf] = made[id(old)]  # type: ignore[assignment]
    scale, shift = (
        None if n is None else program.root.get_parameter(n).detach().double()
        for n in (fold.scale, fold.shift)
    )
    for weight_name, bias_name, transposed in fold.readers:
        holder, leaf = _holder(root, weight_name)
        weight = holder._parameters[leaf]
        assert weight is not None
        wide = weight.detach().double()
        if shift is not None:
            moved = shift @ (wide if transposed else wide.t())
            if bias_name is None:
                add_bias(holder, leaf, nn.Parameter(moved.to(weight.dtype), weight.requires_grad))
            else:
                other, name = _holder(root, bias_name)
                bias = other._parameters[name]
                assert bias is not None
                other._parameters[name] = _like(bias, bias.detach().double() + moved)  # type: ignore[assignment]
        if scale is not None:
            columns = scale.unsqueeze(1) if transposed else scale
            holder._parameters[leaf] = _like(weight, wide * columns)  # type: ignore[assignment]
        if isinstance(holder, fx.GraphModule):
            holder.recompile()


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def _like(old: Tensor, value: Tensor) -> Tensor:
    value = value.to(old.dtype)
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
