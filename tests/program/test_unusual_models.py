"""Models that are written in unusual ways: each is captured and computes the same, or is refused precisely."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError
from graftc.program.capture import capture
from graftc.program.model import Model


def agrees(module: nn.Module, **inputs: Any) -> None:
    """The Program computes what the module computes, each on a fresh copy."""
    program = capture(Model(copy.deepcopy(module), inputs))
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    with torch.no_grad():
        wanted = module(**inputs)
        found = program.root(*[tensors[p.name] for p in program.inputs])
    torch.testing.assert_close(found[0], wanted[0] if isinstance(wanted, tuple) else wanted)


def refused(module: nn.Module, **inputs: Any) -> str:
    with pytest.raises(GraftError) as caught:
        capture(Model(module, inputs))
    return str(caught.value)


X = torch.arange(12.0).reshape(2, 6)


class Written(nn.Module):
    """Writes into a slice of a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, 0::2] = x[:, 1::2]
        out[:, 1::2] = -x[:, 0::2]
        return out.relu_() + x


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x) + 1  # type: ignore[no-any-return]


class Rotated(nn.Module):
    """Complex numbers inside, as some rotary positions have them."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = z * torch.polar(torch.ones(3), torch.arange(3.0))
        return torch.view_as_real(turned).flatten(-2)


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, size: int = 3) -> tuple[Tensor, None]:
        return (x * size if mask is None else x * mask), None


class Pair(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + 2 * pair[1]


@pytest.mark.parametrize("module", [Written(), Custom(), Rotated(), Optional()])
def test_it_computes_the_same(module: nn.Module) -> None:
    agrees(module, x=X)


def test_none_and_numbers_among_the_inputs() -> None:
    agrees(Optional(), x=X, mask=None, size=5)


def test_a_tuple_of_inputs() -> None:
    program = capture(Model(Pair(), {"pair": (X, X + 1)}))
    assert [p.name for p in program.inputs] == ["pair_0", "pair_1"]
    torch.testing.assert_close(program.root(X, X + 1)[0], 3 * X + 2)


def test_hooks_run_while_capturing() -> None:
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, args, out: out + 1)
    agrees(nn.Sequential(layer), input=X)


@dataclass
class Batch:
    image: Tensor


class OfBatch(nn.Module):
    def forward(self, batch: Batch) -> Tensor:
        return batch.image + 1


def test_a_dataclass_is_refused_with_what_to_do() -> None:
    text = refused(OfBatch(), batch=Batch(X))
    assert "G253" in text
    assert "register_dataclass" in text


def test_data_parallel_is_refused_with_what_to_do() -> None:
    text = refused(nn.DataParallel(nn.Linear(6, 6)), input=X)
    assert "G251" in text
    assert "give `module` of it" in text


def test_quantised_weights_are_refused() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(6, 6)), {nn.Linear}, dtype=torch.qint8
    )
    assert "G252" in refused(quantised, input=X)


def test_autocast_inside_a_model_is_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.linear(x)

    assert "G250" in refused(Half(), x=X)


def test_train_and_eval_are_captured_apart() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    train = capture(Model(module.train(), {"input": X}))
    assert train.facts.mode == "train"
    assert any("dropout" in str(n.target) for _, m in train.graphs() for n in m.graph.nodes)
    evaluated = capture(Model(module.eval(), {"input": X}))
    assert evaluated.facts.mode == "eval"
    assert not any("dropout" in str(n.target) for _, m in evaluated.graphs() for n in m.graph.nodes)


class Cached(nn.Module):
    """Returns a cache, as transformers' decoders do unless told otherwise."""

    def forward(self, x: torch.Tensor) -> Any:
        from transformers import DynamicCache

        return x, DynamicCache()


def test_a_cache_among_the_outputs_is_refused_with_what_to_do() -> None:
    with pytest.raises(GraftError, match=r"G210(.|\n)*use_cache"):
        capture(Model(Cached(), {"x": torch.zeros(2, 3)}))
