"""Inputs whose values a capture fixes: what a model computes from them alone is known while it is traced.

Some models read lengths out of a mask (`mask.sum(1).tolist()`) and build their graph by them. Tracing has no
values to read. Where the user says that an input is `fixed`, its example's values stand in: each op on known
values alone is computed beside the tracing, and what reads a number of them gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

_READS: frozenset[Any] = frozenset({
    Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__,
})  # fmt: skip
_LARGEST = 1 << 16
"""Elements of a value that is followed: lengths and masks, not activations."""


class _Values(TorchFunctionMode):
    """The values of tensors that come from fixed inputs alone, by the identity of what is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def learn(self, traced: Tensor, real: Tensor) -> None:
        self.known[id(traced)] = (traced, real)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        tensors = [v for v in pytree.tree_leaves(given) if isinstance(v, Tensor)]
        writes = func is Tensor.__setitem__ or _is_in_place(func)
        if (
            func is Tensor.__getitem__
            and isinstance(chosen := args[1], Tensor)
            and id(args[0]) not in self.known
        ):
            args = (args[0], self._places(chosen))  # which ones a mask chooses is known
        if not tensors or not all(id(t) in self.known for t in tensors):
            if writes and tensors:
                self.known.pop(id(tensors[0]), None)
            return func(*args, **given[1])
        real = self._real(func, given)
        if func in _READS:
            return real
        result = func(*args, **given[1])
        if not writes:
            traced, found = pytree.tree_leaves(result), pytree.tree_leaves(real)
            for new, value in zip(traced, found, strict=True):
                if isinstance(new, Tensor) and value.numel() <= _LARGEST:
                    self.learn(new, value)
        return result

    def _places(self, chosen: Tensor) -> Any:
        """The indices that a known mask of bools chooses; anything else as it is."""
        if id(chosen) not in self.known or chosen.dtype is not torch.bool:
            return chosen
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return self.known[id(chosen)][1].nonzero(as_tuple=True)

    def _real(self, func: Callable[..., Any], given: tuple[Any, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: self.known[id(t)][1], given)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return func(*args, **kwargs)


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


@contextmanager
def values_known(module: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Within, a traced forward of `module` knows the values of these inputs."""
    if not values:
        yield
        return
    mode = _Values()

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        for name, value in values.items():
            mode.learn(kwargs[name], value)

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with mode:
            yield
    finally:
        hook.remove()


def make_constant(root: fx.GraphModule, values: Mapping[str, Tensor]) -> None:
    """Put the fixed values in place of the inputs, as buffers of the root (in place)."""
    for node in [n for n in root.graph.nodes if n.op == "placeholder" and n.target in values]:
        name = f"fixed_{node.target}"
        held = values[str(node.target)].detach().clone()
        root.register_buffer(name, held, persistent=False)  # the model has none of this name
        with root.graph.inserting_after(node):
            constant = root.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        root.graph.erase_node(node)
    # get_attr nodes may stand between placeholders, which must come first
    first = next(n for n in root.graph.nodes if n.op != "placeholder")
    for node in [n for n in root.graph.nodes if n.op == "placeholder"]:
        first.prepend(node)
