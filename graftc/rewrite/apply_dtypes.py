"""Casts to the dtype of a weight, after the module that had the weight was replaced."""

from __future__ import annotations

from torch import fx, nn

from graftc.diagnostics import fail
from graftc.program.program import ATEN, value
from graftc.rewrite.apply_common import exists, parent_path


def follow_new_weights(module: fx.GraphModule) -> None:
    """Read dtypes from the weights that stand there now (`graftc.program.dtypes` wrote the casts).

    A module in the old one's place without weights takes what it is given, so its cast goes. Raises GraftError
    where the weight itself, not its dtype alone, is read outside of the module that was replaced.
    """
    for node in list(module.graph.nodes):
        if node.op != "get_attr" or _reads(module, str(node.target)):
            continue
        dtypes = [u for u in node.users if u.target is getattr and u.args[1] == "dtype"]
        if len(dtypes) < len(node.users):
            fail("G361", f"`{node.target}` is also read outside of the module that is replaced",
                 site=parent_path(str(node.target)), help="name a larger site, which holds both")  # fmt: skip
        name = _weight_of(module, str(node.target))
        if name is not None:
            node.target = name
            before = value(node)
            after = module.get_parameter(name)
            node.meta["val"] = before.new_empty(tuple(after.shape), dtype=after.dtype)
            continue
        for dtype in dtypes:
            for cast in [u for u in dtype.users if u.target is ATEN.to.dtype]:
                cast.replace_all_uses_with(cast.args[0])
                module.graph.erase_node(cast)
            module.graph.erase_node(dtype)
        module.graph.erase_node(node)


def _reads(module: nn.Module, target: str) -> bool:
    holder, _, name = target.rpartition(".")
    return exists(module, holder) and hasattr(module.get_submodule(holder), name)


def _weight_of(module: nn.Module, target: str) -> str | None:
    """A floating-point parameter of what stands nearest to where the weight was."""
    holder = parent_path(target)
    if not holder or not exists(module, holder):
        return None
    found = module.get_submodule(holder).named_parameters()
    return next((f"{holder}.{n}" for n, p in found if p.is_floating_point()), None)
