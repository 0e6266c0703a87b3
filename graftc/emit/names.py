"""What a person would call a variable.

Names come from what a value is for (a query, a scale, a batch size), from the module that made it,
and from the inputs of the model that pass through; the number that an exporter gave it is the last
resort. Nothing here decides what is computed: any name that is free is correct.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

_STREAMS = ("hidden_states", "x", "h", "tokens")
_LAYOUT = frozenset(
    {"view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "squeeze",
     "contiguous", "to", "expand", "chunk", "repeat_interleave", "repeat", "slice", "clone"}
)  # fmt: skip
_NOUNS = {
    "cat": "joined",
    "stack": "stacked",
    "arange": "positions",
    "einsum": "product",
    "matmul": "product",
    "bmm": "product",
    "sum": "total",
    "mean": "mean",
    "mul": "scaled",
    "add": "total",
    "sub": "difference",
    "div": "ratio",
    "exp": "rates",
    "linear": "projected",
    "unsqueeze": "widened",
    "transpose": "turned",
    "rsqrt": "inverse_rms",
    "where": "chosen",
    "softmax": "weights",
    "pow": "square",
    "scaled_dot_product_attention": "attended",
    "reshape": "reshaped",
    "view": "reshaped",
    "to": "cast",
    "_to_copy": "cast",
}
RESERVED = frozenset({"torch", "nn", "F", "math", "self", "range", "zip", "str", "float", "super"})
PURPOSES = frozenset({"q", "k", "v", "angles"})
_SDPA_ROLES = {0: "q", 1: "k", 2: "v"}


@dataclass(frozen=True)
class Style:
    """Names that hold for the whole file.

    `stream` is the token stream's name; `inputs` are the root's; `sizes` gives the dynamic
    dimensions' names by the symbol that capture used.
    """

    stream: str
    inputs: frozenset[str]
    sizes: Mapping[str, str] = field(default_factory=dict[str, str])


def stream_name(inputs: tuple[str, ...]) -> str:
    """The root's own word for the token stream, else `x`.

    >>> stream_name(("hidden_states", "timestep"))
    'hidden_states'
    """
    return next((n for n in _STREAMS if n in inputs), "x")


def clean(name: str) -> str:
    """A Python name that reads well: `to_q` → `q`, `layers.0` → `layers`."""
    words = [w for w in name.split(".") if not w.isdigit()]
    word = re.sub(r"\W", "_", words[-1] if words else "item").strip("_") or "item"
    word = re.sub(r"^to_(q|k|v|qkv|kv|out)$", r"\1", word)
    word = re.sub(r"^\d+_?", "", word) or "item"  # `3_graft0`, beside block 3
    return f"{word}_" if keyword.iskeyword(word) or word == "self" else word


def operation(node: fx.Node) -> str:
    """`transpose` for `aten.transpose.int`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def is_float(node: fx.Node, least: int) -> bool:
    """Whether a value is a floating-point tensor of at least so many dimensions."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= least


def is_stream(node: fx.Node) -> bool:
    """Whether a value looks like tokens: floating point, [batch, tokens, channels]."""
    return is_float(node, 3) and node.meta["val"].ndim == 3


def layout_base(node: fx.Node) -> fx.Node:
    """The value that `node` is another view of: what a chain of reshapes began with, or itself."""
    return node if node.target is operator.getitem else _base(node)


def suggestions(node: fx.Node, style: Style) -> list[str]:
    """Names for a value, the best first; the caller takes the first that is free."""
    found: list[str] = []
    purpose = _purpose(node)
    if purpose:
        found.append(purpose)
    size = _size_name(node, style)
    if size:
        found.append(size)
    base = _base(node)
    if base.op == "call_module":
        name = clean(str(base.target))
        part = node.target is operator.getitem or str(base.target).rpartition(".")[2][:1].isdigit()
        found += [style.stream, "h", name] if part and is_stream(node) else [name]
    if is_stream(node):
        found.append(style.stream)
    if _sum_of_stream(node):
        found = [style.stream, *found]
    name = _NOUNS.get(operation(node), operation(node))
    if operation(node) == "add" and is_float(node, 2) and not is_float(node, 3):
        name = "emb"
    found.append("h" if is_stream(node) else "part" if name == "getitem" else clean(name))
    return found


def _base(node: fx.Node) -> fx.Node:
    """What a chain of reshapes began with."""
    while node.op in ("call_function", "call_method") and operation(node) in _LAYOUT | {"getitem"}:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _sum_of_stream(node: fx.Node) -> bool:
    """Whether a value is a residual sum."""
    return operation(node) in ("add", "add_") and is_stream(node) and all(
        isinstance(a, fx.Node) for a in node.args[:2]
    )  # fmt: skip


def _size_name(node: fx.Node, style: Style) -> str | None:
    if not isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return None
    return style.sizes.get(str(node.meta["val"]), "size")


def _purpose(node: fx.Node) -> str | None:
    """What a value's one use says that it is: q, k, v, a mask, an angle; shift, scale or gate."""
    if not isinstance(node.meta.get("val", torch.Tensor), (torch.Tensor, type)):
        return None
    users = list(node.users)
    if len(users) == 2 and {operation(u) for u in users} == {"sin", "cos"}:
        return "angles"
    if _is_mask(node):
        return "mask"
    seen = node
    while len(seen.users) == 1:
        user = next(iter(seen.users))
        name = operation(user)
        if name == "scaled_dot_product_attention":
            at = [i for i, a in enumerate(user.args) if a is seen]
            return _SDPA_ROLES.get(at[0]) if at else None
        if name in ("add", "mul") and (modulation := _modulation(node, seen, user)):
            return modulation
        if name not in _LAYOUT:
            return None
        seen = user
    return None


def _is_mask(node: fx.Node) -> bool:
    """Whether a value ends as the mask of an attention, here or in a module that it is given to."""
    user = next(iter(node.users), None)
    if user is None:
        return False
    if operation(user) == "scaled_dot_product_attention":
        return user.kwargs.get("attn_mask") is node or any(a is node for a in user.args[3:4])
    if user.op == "call_module" and user.graph.owning_module is not None and node in user.args:
        callee = user.graph.owning_module.get_submodule(str(user.target))
        if not isinstance(callee, fx.GraphModule):
            return False
        inputs = [n for n in callee.graph.nodes if n.op == "placeholder"]
        at = user.args.index(node)
        return at < len(inputs) and _is_mask(inputs[at])
    return user.op == "call_function" and operation(user) in _LAYOUT and _is_mask(user)


def _is_factor(node: fx.Node) -> bool:
    """Whether a value modulates tokens and is none itself: [batch, channels] or [batch, 1, channels]."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (
        value.ndim == 2 or (value.ndim == 3 and value.shape[1] == 1)
    )


def _modulation(node: fx.Node, seen: fx.Node, user: fx.Node) -> str | None:
    """`scale` in n · (1 + scale) + shift, `gate` in gate · branch, with what they act on."""
    if node.target is not operator.getitem or not _is_factor(node):
        return None
    other = next((a for a in user.args if a is not seen), None)
    if operation(user) == "add":
        if not isinstance(other, fx.Node):
            product = next(iter(user.users), None)
            acted = _other(product, user) if product is not None else None
            return f"scale_{_made_by(acted)}" if acted is not None and _made_by(acted) else "scale"
        if operation(other) != "mul":
            return None
        made = _made_by(_factor(other))
        return f"shift_{made}" if made else "shift"
    made = _made_by(other) if isinstance(other, fx.Node) else None
    return f"gate_{made}" if made else None


def _other(user: fx.Node, seen: fx.Node) -> fx.Node | None:
    return next((a for a in user.args if isinstance(a, fx.Node) and a is not seen), None)


def _factor(node: fx.Node) -> fx.Node | None:
    """The factor of a product that a module made."""
    if operation(node) != "mul":
        return None
    factors = [a for a in node.args if isinstance(a, fx.Node)]
    return next((f for f in factors if _base(f).op == "call_module"), None)


def _made_by(node: fx.Node | None) -> str | None:
    base = _base(node) if node is not None else None
    return clean(str(base.target)) if base is not None and base.op == "call_module" else None
