"""The dropouts of train mode as modules of the printed model, from the notes of `graftc.program.dropout`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from graftc.program.dropout import ATTENTION, LAYOUT, RATE, SIZES, Drop, drops, noted
from graftc.program.dropout_rate import DropoutRate
from graftc.program.program import ATEN, Program, generate_code, graphs, join, value
from graftc.rewrite.tree import set_module, with_own_paths

_FEATURES: dict[int, type[nn.Module]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


def with_dropout(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program with a module at every dropout that is noted, and the paths of these; `program` stays as it is.

    In eval mode it computes what `program` computes. A module has the original's name where that is free.

    >>> from graftc.program.modes import captured
    >>> from graftc.program.model import Model
    >>> layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4)).eval()
    >>> with_dropout(captured(Model(layers, {"input": torch.zeros(2, 4)})))[1]
    ('1',)
    """
    places = noted(program)
    if not places:
        return program, ()
    touched = {path for path, _, _ in places}
    touched |= {p for path, _, drop in places if (p := _container(program.root, path, drop))}
    root = with_own_paths(program.root, touched)
    made: list[str] = []
    for path, module in list(graphs(root)):
        if any(drops(n) for n in module.graph.nodes):
            made += [join(path, name) for name in _make(module)]
            generate_code(module)
    return replace(program, root=root), tuple(made)


def _container(root: nn.Module, path: str, drop: Drop) -> str | None:
    """The path of the list that held the dropout's module (`net` of `net.1`), where it is still there."""
    inner = drop.name.rpartition(".")[0]
    try:
        return join(path, inner) if inner and root.get_submodule(join(path, inner)) else None
    except AttributeError:
        return None


def _make(owner: fx.GraphModule) -> list[str]:
    """Put the modules into a graph (in place); their names."""
    names: dict[str, None] = {}
    inputs = [n for n in owner.graph.nodes if n.op == "placeholder"]
    after_inputs = inputs[-1] if inputs else None
    for node in list(owner.graph.nodes):
        readers = {u for u in node.users if u.target not in SIZES}
        end, at = node, node
        if node.op == "placeholder" and after_inputs is not None:
            at = after_inputs
        for drop in drops(node):
            if drop.kind == LAYOUT:
                with owner.graph.inserting_after(at):
                    end = at = owner.graph.call_function(ATEN.contiguous.default, (end,))
                at.meta["val"] = value(node)
                continue
            name = _placed(owner, drop, value(node))
            names[name] = None
            if drop.kind == ATTENTION:
                _set_rate(owner.graph, node, name)
                continue
            with owner.graph.inserting_after(at):
                at = owner.graph.call_module(name, (end,))
            at.meta["val"] = value(node)
            end = at
        if end is not node:
            node.replace_all_uses_with(end, delete_user_cb=lambda u, own=readers: u in own)
            if node.op == "placeholder":
                after_inputs = end
    return list(names)


def _set_rate(graph: fx.Graph, attention: fx.Node, name: str) -> None:
    with graph.inserting_before(attention):
        rate = graph.call_module(name, ())
    args = [*attention.args, *[None] * max(0, RATE - len(attention.args))]
    attention.args = (*args[:RATE], rate, *args[RATE + 1 :])


def _placed(owner: fx.GraphModule, drop: Drop, dropped: object) -> str:
    """The name of the module of a dropout, put in its place; one that is called several times is one module."""
    made = _module(drop, dropped)
    name = drop.name
    held, _, last = name.rpartition(".")
    if held and not _is_there(owner, held):
        name, held = "dropout", ""
    number = 1
    while True:
        found = _found(owner, name)
        if found is None and not hasattr(owner.get_submodule(held), name.rpartition(".")[2]):
            break
        if type(found) is type(made) and found is not None and found.p == made.p:
            return name
        number += 1
        base = "dropout" if last.isdecimal() or not last else last
        name = join(held, f"{base}_{number}")
    set_module(owner, name, made)
    _in_order(owner.get_submodule(held))
    return name


def _module(drop: Drop, dropped: object) -> nn.Module:
    if drop.kind == ATTENTION:
        return DropoutRate(drop.p)
    if drop.kind == "feature_dropout":
        ndim = dropped.ndim if isinstance(dropped, torch.Tensor) else 4
        return _FEATURES.get(ndim, nn.Dropout2d)(drop.p)
    kinds = {"alpha_dropout": nn.AlphaDropout, "feature_alpha_dropout": nn.FeatureAlphaDropout}
    return kinds.get(drop.kind, nn.Dropout)(drop.p)


def _is_there(owner: nn.Module, path: str) -> bool:
    try:
        return owner.get_submodule(path) is not None
    except AttributeError:
        return False


def _found(owner: nn.Module, path: str) -> nn.Module | None:
    return owner.get_submodule(path) if _is_there(owner, path) else None


def _in_order(holder: nn.Module) -> None:
    """The members of a list by their numbers."""
    if all(n.isdecimal() for n in holder._modules):
        holder._modules = dict(sorted(holder._modules.items(), key=lambda item: int(item[0])))
