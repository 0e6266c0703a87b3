"""The gate that follows a site: adaLN's factor between its output and the stream, told from dataflow."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import fx, nn

from graftc.diagnostics import fail

_PASSES = ("contiguous", "clone", "to", "type_as", "_to_copy", "dropout", "alias", "detach")


def gate_after(output: fx.Node, site: str) -> fx.Node:
    """The factor that multiplies a site's output before it is added to the stream (adaLN's gate).

    Told from dataflow: the one use of the output, past casts and dropout, is a product, and the
    product's one use is a sum. Raises GraftError (G552) where that is not so.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.mlp = nn.Linear(2, 2)
    ...     def forward(self, x, c):
    ...         return x + c * self.mlp(x)
    >>> graph = fx.symbolic_trace(Block()).graph
    >>> gate_after(next(node for node in graph.nodes if node.name == "mlp"), "mlp").name
    'c'
    """
    scaled = _use(output)
    if scaled is None or _operation(scaled) not in ("mul", "multiply"):
        _no_gate(site, scaled)
    factors = [a for a in scaled.args if isinstance(a, fx.Node) and not _comes_from(a, output)]
    added = _use(scaled)
    if len(factors) != 1 or added is None or _operation(added) not in ("add", "iadd", "addcmul"):
        _no_gate(site, added)
    return factors[0]


def batch_first(gate: Any, output: Any) -> Any:
    """A gate with a batch axis of its own: [B, …], whatever it was broadcast from."""
    shape = (*(1 for _ in range(output.ndim - gate.ndim)), *gate.shape)
    return gate.reshape(shape).expand(output.shape[0], *shape[1:])


def _no_gate(site: str, found: fx.Node | None) -> NoReturn:
    fail("G552", f"no gate follows `{site}`", site=site,
         wanted="its output times a factor, then a sum with the stream (adaLN)",
         found=f"`{_operation(found)}`" if found is not None else "several uses of it, or none",
         help="leave out `gate = true`")  # fmt: skip


def _use(node: fx.Node) -> fx.Node | None:
    """The one node that uses a value, past what leaves it as it is."""
    while len(node.users) == 1:
        (user,) = node.users
        if not _passes(user):
            return user
        node = user
    return None


def _passes(node: fx.Node) -> bool:
    if node.op == "call_module":
        child = node.graph.owning_module
        found = child.get_submodule(str(node.target)) if child is not None else None
        return isinstance(found, (nn.Dropout, nn.Identity))
    return _operation(node) in _PASSES


def _operation(node: fx.Node) -> str:
    """What a node does, in one word: `mul` for `operator.mul`, `x.mul` and `aten.mul.Tensor` alike."""
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", node.target))
        return name.removeprefix("aten.").partition(".")[0]
    return str(node.target).rpartition(".")[2].rstrip("_")


def _comes_from(node: fx.Node, source: fx.Node) -> bool:
    while node is not source and len(node.all_input_nodes) == 1 and _passes(node):
        node = node.all_input_nodes[0]
    return node is source
