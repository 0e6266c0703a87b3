"""The form `flex`: FlexAttention computes what the definition says, and looks at the blocks that it must.

Run here by FlexAttention's own eager implementation; its kernels are for `pytest -m gpu`.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import graftc.verbs as verbs
from graftc.emit.build import Build
from graftc.operators import flex
from graftc.operators.flex import (
    FlexJointLocalAttention2d,
    FlexLocalAttention2d,
    FlexWindow,
    disc_blocks,
    window_blocks,
)
from graftc.operators.local_2d import JointLocalAttention2d, LocalAttention2d
from graftc.operators.sliding_window import SlidingWindow
from graftc.program.model import Model
from graftc.tasks.base import Prepared

DIM, HEADS = 16, 4


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention in eager mode on the CPU: all scores and the mask, and gradients, which torch has but refuses."""
    as_on_a_gpu(monkeypatch, flex)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "has_kernel", lambda *given: True)
    monkeypatch.setattr(module, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *given: None, raising=False)


def dense(op: SlidingWindow, x: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, from all pairs and head by head."""
    q, k, v = op.split(op.in_proj(x))
    i = torch.arange(x.shape[1])
    away = i.unsqueeze(1) - i
    seen = (away <= op.window) & (away >= (0 if op.causal else -op.window))
    each, heads = op.heads // op.kv_heads, []
    for h in range(op.heads):
        s = op.scale * (q[:, :, h] @ k[:, :, h // each].transpose(1, 2))
        s = s if op.softcap is None else op.softcap * torch.tanh(s / op.softcap)
        weight = s.exp() * seen
        if mask is not None:
            own = mask[:, h if mask.shape[1] > 1 else 0]
            weight = weight * own if mask.dtype == torch.bool else weight * own.exp()
        heads.append((weight / weight.sum(-1, keepdim=True)) @ v[:, :, h // each])
    return op.out_proj(torch.cat(heads, -1))


def of_keys(batch: int, tokens: int) -> Tensor:
    """Every second key is hidden, but every token has one in sight."""
    return (torch.arange(tokens) % 2 == 0).expand(batch, 1, 1, tokens)


def of_pairs(batch: int, tokens: int) -> Tensor:
    return torch.linspace(-1, 1, HEADS * tokens * tokens).reshape(1, HEADS, tokens, tokens)


CASES = {
    "both sides": ({"window": 5}, None),
    "causal, grouped, capped": ({"window": 5, "causal": True, "kv_heads": 2, "softcap": 1.5}, None),
    "a mask of keys": ({"window": 70, "kv_heads": 1}, of_keys),
    "a mask that is added": ({"window": 9, "scale": 0.7}, of_pairs),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("eager")
def test_a_window_is_its_definition(case: str) -> None:
    given, masked = CASES[case]
    torch.manual_seed(0)
    op = FlexWindow(DIM, HEADS, **given).double()
    for tokens, batch in ((1, 3), (7, 1), (64, 3), (100, 1), (300, 1)):
        x = torch.randn(batch, tokens, DIM, dtype=torch.float64, requires_grad=True)
        mask = None if masked is None else masked(batch, tokens)
        mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        found, wanted = op(x, mask), dense(op, x, mask)
        assert (found - wanted).norm() <= 1e-10 * wanted.norm()
        tangent = torch.randn_like(wanted)
        for a, b in zip(
            torch.autograd.grad(found, [x, *op.parameters()], tangent),
            torch.autograd.grad(wanted, [x, *op.parameters()], tangent),
            strict=True,
        ):
            assert (a - b).norm() <= 1e-10 * max(b.norm(), tangent.norm())
    with torch.no_grad():
        long = torch.randn(1, 1024, DIM, dtype=torch.float64)
        mask = None if masked is None else masked(1, 1024)
        mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        found, wanted = op(long, mask), dense(op, long, mask)
        assert (found - wanted).norm() <= 1e-10 * wanted.norm()
    mask = None if masked is None else masked(1, 300)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        low, y = FlexWindow(DIM, HEADS, **given).to(dtype), x.detach().to(dtype)
        low.load_state_dict(op.state_dict())
        op.load_state_dict(low.state_dict())  # the same weights, as they were rounded
        mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
        wanted = dense(op, y.double(), mask)
        assert (low(y, mask).double() - wanted).norm() <= bound * wanted.norm(), dtype


@pytest.mark.usefixtures("eager")
def test_discs_are_those_of_the_tiles() -> None:
    """Alone, beside other tokens on either side, and joint with a second stream: outputs and gradients."""
    made = (
        (LocalAttention2d, FlexLocalAttention2d, {"kv_heads": 2}, (35,)),
        (LocalAttention2d, FlexLocalAttention2d, {"groups": "text: full, image: local"}, (39,)),
        (LocalAttention2d, FlexLocalAttention2d, {"groups": "image: local, text: full"}, (39,)),
        (
            JointLocalAttention2d, FlexJointLocalAttention2d,
            {"context_dim": DIM, "streams": "image, text", "groups": "text: full, image: local"}, (35, 4),
        ),
    )  # fmt: skip
    for own, fast, given, lengths in made:
        torch.manual_seed(0)
        one = own(dim=DIM, heads=HEADS, radius=2, height=5, width=7, **given).double()
        other = fast(dim=DIM, heads=HEADS, radius=2, height=5, width=7, **given).double()
        other.load_state_dict(one.state_dict())
        x = [torch.randn(3, n, DIM, dtype=torch.float64) for n in lengths]
        (found, wanted) = (m(*x) for m in (other, one))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        for y in (wanted, found):
            sum(t.square().mean() for t in (y if isinstance(y, tuple) else (y,))).backward()
        for a, b in zip(other.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


def of_blocks(mask: torch_flex.BlockMask, tokens: int) -> tuple[Tensor, Tensor]:
    """(the blocks that the table names, the blocks that have a pair that is seen)."""
    count = -(-tokens // 128)
    seen = torch_flex.create_mask(mask.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0]
    seen = torch.nn.functional.pad(seen, (0, count * 128 - tokens) * 2)
    right = seen.unflatten(0, (count, 128)).unflatten(2, (count, 128)).any(3).any(1)
    return mask.to_dense()[0, 0].bool(), right


@pytest.mark.parametrize("tokens", [1, 128, 129, 700])
@pytest.mark.parametrize("before", [1, 127, 128, 129, 300])
def test_the_table_of_a_window_names_the_blocks_that_are_seen(tokens: int, before: int) -> None:
    for after in (0, before):
        found, right = of_blocks(window_blocks(tokens, before, after, torch.device("cpu")), tokens)
        assert (found | ~right).all()
        inner = found[
            : tokens // 128, : tokens // 128
        ]  # the last one is filled up, and may be named
        assert torch.equal(inner, right[: tokens // 128, : tokens // 128])


def test_the_table_of_discs_misses_no_block_that_is_seen_and_leaves_some_out() -> None:
    grids = ((40, 20, 3), (10, 64, 4), (64, 10, 9))
    for (height, width, radius), first, more in itertools.product(grids, (0, 5, 130), (0, 40)):
        tokens = first + height * width + more
        table = disc_blocks(height, width, radius, first, tokens, torch.device("cpu"))
        found, right = of_blocks(table, tokens)
        assert (found | ~right).all()
        assert not found.all() or first + more > 100


def test_a_compiled_forward_pass_goes_through_flex_attention_whole() -> None:
    """One graph, at one length and another; the op is in it, and nothing of tokens by tokens beside it."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    fast, own = FlexWindow(DIM, HEADS, 9, 2), SlidingWindow(DIM, HEADS, 9, 2)
    own.load_state_dict(fast.state_dict())
    run = torch.compile(fast, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (300, 200):
            x = torch.randn(2, tokens, DIM)
            torch.testing.assert_close(run(x), own(x), rtol=1e-5, atol=1e-6)
    assert all(any("flex_attention" in str(n.target) for n in g.graph.nodes) for g in graphs)
    x = torch.randn(1, 200, DIM, requires_grad=True)  # which FlexAttention cannot on a CPU
    torch.testing.assert_close(run(x), own(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlexWindow(DIM, HEADS, 9),
        lambda: FlexLocalAttention2d(DIM, HEADS, 3, 20, 18),
    ],
    ids=["window", "discs"],
)
@pytest.mark.usefixtures("eager")
def test_a_table_of_one_mode_does_for_the_next(make: Any) -> None:
    """A plan on tensors without values, then evaluation, then training: each of one length, the table made once."""
    flex.kept_window.cache_clear()
    flex.kept_disc.cache_clear()
    torch.manual_seed(0)
    op, x = make(), torch.randn(1, 360, DIM)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert op(torch.empty(1, 360, DIM)).shape == (1, 360, DIM)
    with torch.inference_mode():
        evaluated = op(x)
    found = op(x)
    found.square().mean().backward()
    assert torch.equal(found, evaluated)
    assert all(p.grad.isfinite().all() for p in op.parameters())
    kept = [f.cache_info() for f in (flex.kept_window, flex.kept_disc)]
    assert sum(k.misses for k in kept) == 1
    (table,) = (
        f(*given)
        for f, given in (
            (flex.kept_window, (360, 9, 9, x.device)),
            (flex.kept_disc, (20, 18, 3, 0, 360, x.device)),
        )
        if f.cache_info().misses
    )
    assert not table.kv_indices.is_inference()
    assert type(table.kv_indices) is Tensor


class Rebuild:
    """The input is the target."""

    def prepare(self, sample: Any, generator: torch.Generator) -> Prepared:
        return Prepared({"src": sample["x"]}, {"y": sample["x"]})

    def loss(self, outputs: Any, prepared: Any) -> Tensor:
        return (outputs - prepared.targets["y"]).square().mean()

    def metrics(self, outputs: Any, prepared: Any) -> dict[str, float]:
        return {"loss": float(self.loss(outputs, prepared))}


RULE = """
rule near {
    match   a = self_attention
    replace a with sliding_window(window = 4, form = flex)
    distill l2, steps = 2, batch = 2
}
"""


def test_a_printed_student_is_distilled_through_flex_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan on tensors without values, the steps and the evaluation, as on a GPU."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 1, 32, batch_first=True, norm_first=True).eval()
    model = Model(torch.nn.ModuleList([layer])[0], {"src": torch.randn(2, 40, 16)}, task=Rebuild())
    (tmp_path / "near.graft").write_text(RULE)
    made = verbs.compile(tmp_path / "near.graft", model, tmp_path / "build", copy_teacher=True)
    calls: list[int] = []

    def student(build: Build, *given: Any, **named: Any) -> Any:
        found = loaded(build, *given, **named)
        for module in found.modules():
            if type(module).__name__ == "FlexWindow":
                file = sys.modules[type(module).__module__]
                as_on_a_gpu(monkeypatch, file)
                monkeypatch.setattr(file, "compiled", lambda: counted)
        return found

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return torch_flex.flex_attention(*given, **named)

    loaded = Build.student
    monkeypatch.setattr(Build, "student", student)
    samples = [{"x": torch.randn(40, 16)} for _ in range(8)]
    report = verbs.distill(made, samples, task=Rebuild(), announce=lambda plan: None)
    assert calls
    assert report.steps == 2


@pytest.mark.slow
def test_the_compiled_kernel_on_a_cpu_agrees() -> None:
    """Inductor's C++ kernel reads the table of blocks, which the eager implementation does not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    for given, masked in CASES.values():
        fast, own = (cls(64, HEADS, **given).eval() for cls in (FlexWindow, SlidingWindow))
        own.load_state_dict(fast.state_dict())
        x = torch.randn(1, 400, 64)
        mask = None if masked is None else masked(1, 400)
        with torch.no_grad():
            made = torch.compile(fast, fullgraph=True)(x, mask)
            torch.testing.assert_close(made, own(x, mask), rtol=1e-4, atol=1e-5)
    fast, own = (
        cls(64, HEADS, 3, 20, 18, groups="text: full, image: local").eval()
        for cls in (FlexLocalAttention2d, LocalAttention2d)
    )
    own.load_state_dict(fast.state_dict())
    x = torch.randn(1, 400, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(fast, fullgraph=True)(x), own(x), rtol=1e-4, atol=1e-5
        )
