"""The values that capture would have recorded, for the graph of an operator written in the language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor


def record_values(module: fx.GraphModule, given: Sequence[torch.Tensor]) -> None:
    """Run a graph on fake tensors and write each node's value into its meta, as in a captured graph.

    `given` are the caller's recorded values; where they are not fake (a pattern's, a test's), plain
    meta tensors of their sizes are used. Memory is not touched.
    """
    mode = next((t.fake_mode for t in given if isinstance(t, FakeTensor)), None)
    twin = fx.GraphModule(_Holder(module, mode, given[0].device), module.graph)
    nodes = {n.name: n for n in module.graph.nodes}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            nodes[n.name].meta["val"] = result
            return result

    with torch.no_grad():
        if mode is None:
            Recorder(twin).run(*(t.to("meta") for t in given))
        else:
            with mode:
                Recorder(twin).run(*given)


class _Holder(nn.Module):
    """The submodules of a graph module with fake parameters."""

    def __init__(self, module: nn.Module, mode: Any, device: torch.device) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, _fake(child, mode, device))
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:  # fmt: skip
            self.register_buffer(name, _fake_tensor(tensor, mode, device))


def _fake_tensor(tensor: torch.Tensor, mode: Any, device: torch.device) -> torch.Tensor:
    """A tensor of the same form on the caller's device, be the operator still without memory."""
    if mode is None:
        return tensor.detach().to("meta")
    if tensor.device.type != "meta":
        return mode.from_tensor(tensor.detach())
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _fake(module: nn.Module, mode: Any, device: torch.device) -> nn.Module:
    import copy

    shell = copy.copy(module)
    shell._parameters = {
        n: None if p is None else nn.Parameter(_fake_tensor(p, mode, device), False)
        for n, p in module._parameters.items()
    }
    shell._buffers = {
        n: None if b is None else _fake_tensor(b, mode, device) for n, b in module._buffers.items()
    }
    shell._modules = {
        n: None if m is None else _fake(m, mode, device) for n, m in module._modules.items()
    }
    return shell
