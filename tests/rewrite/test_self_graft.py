"""`replace a with attention()` gives the same function back, whatever stands between the linears and the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.compiler import Compiled, compile_model
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.program.model import Model

DIM, HEADS, WIDE = 16, 4, 4


class OnePlus(nn.Module):
    """Gemma's norm: what its scale differs from one by is stored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Plain(nn.Module):
    """Self-attention; subclasses say what q and k go through."""

    scale: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.out: nn.Module = nn.Linear(DIM, DIM)

    def make(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut(self.q(x)), self.cut(self.k(x))

    def cut(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, WIDE)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.make(x)
        y = F.scaled_dot_product_attention(q, k, self.cut(self.v(x)), scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class ScaledFirst(Plain):
    """As Whisper and OPT do it."""

    scale = 1.0

    def make(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut(self.q(x) * 0.3), self.cut(self.k(x) / 2)


class NormedHeads(Plain):
    scale = 0.2

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(WIDE), norm(WIDE)

    def make(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(self.cut(self.q(x))), self.k_norm(self.cut(self.k(x)))


class NormedWidth(Plain):
    """As Wan does it, the heads interleaved besides: the norm's weights move with the features."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(DIM, eps=1e-3), nn.RMSNorm(DIM, eps=1e-3)

    def cut(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (WIDE, HEADS)).permute(0, 3, 1, 2)

    def make(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut(self.q_norm(self.q(x))), self.cut(self.k_norm(self.k(x)))


class WithoutOut(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Identity()


class Bent(Plain):
    """What no operator does."""

    def make(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut(torch.tanh(self.q(x))), self.cut(self.k(x))


class UnitLength(Plain):
    """A norm that no operator has."""

    def make(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.cut(self.q(x)), dim=-1), F.normalize(self.cut(self.k(x)), dim=-1)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Biased(nn.Module):
    """T5: the bias is computed inside the first attention and handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = BiasedAttention(), BiasedAttention()

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y, bias = self.one(x, seen, None)
        x = x + y
        return x + self.two(x, seen, bias)[0]


class BiasedAttention(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, HEADS)

    def forward(self, x: Tensor, seen: Tensor, bias: Tensor | None) -> Any:  # type: ignore[override]
        if bias is None:
            n = torch.arange(x.shape[1])
            bias = self.table(n.unsqueeze(1) - n + 10).permute(2, 0, 1).unsqueeze(0)
        mask = torch.where(seen, bias, torch.finfo(x.dtype).min)
        q, k = self.make(x)
        y = F.scaled_dot_product_attention(q, k, self.cut(self.v(x)), attn_mask=mask, scale=1.0)
        return self.out(y.transpose(1, 2).flatten(2)), bias


class TokensFirst(nn.Module):
    """PyTorch's own module in its default layout, [tokens, batch, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return module.eval()


def model_of(module: nn.Module, tokens: int = 6) -> Model:
    torch.manual_seed(0)
    body = module if isinstance(module, (Biased, TokensFirst)) else Block(module)
    inputs: dict[str, Any] = {"x": torch.randn(2, tokens, DIM)}
    if isinstance(module, Biased):
        inputs["seen"] = (torch.arange(tokens) < torch.tensor([[tokens], [4]]))[:, None, None]
    if isinstance(module, TokensFirst):
        inputs["x"] = torch.randn(tokens, 2, DIM)
        return Model(drawn(body), inputs, dynamic={})
    return Model(drawn(body), inputs)


def grafted(model: Model, edit: str = "attention()", *clauses: str) -> Compiled:
    text = "\n ".join(["match a = self_attention", f"replace a with {edit}", *clauses])
    return compile_model(check(f"rule r {{\n {text}\n}}\n"), model)


SITES: dict[str, Callable[[], nn.Module]] = {
    "a factor before the heads": ScaledFirst,
    "rms norm of each head": lambda: NormedHeads(lambda n: nn.RMSNorm(n, eps=1e-3)),
    "layer norm of each head": lambda: NormedHeads(nn.LayerNorm),
    "layer norm without weights": lambda: NormedHeads(lambda n: nn.LayerNorm(n, elementwise_affine=False)),
    "a norm written out": lambda: NormedHeads(OnePlus),
    "rms norm of all heads": NormedWidth,
    "no last map": WithoutOut,
    "a bias computed inside": Biased,
    "tokens before the batch": TokensFirst,
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_it_is_the_same_function(name: str) -> None:
    model = model_of(SITES[name]())
    compiled = grafted(model)
    with torch.no_grad():
        wanted = model.module(**model.inputs)
        found = compiled.student.root(*[model.inputs[p.name] for p in compiled.student.inputs])
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    origins = [o.text for s in compiled.plan.steps for o in s.origins]
    assert origins
    assert all(text.startswith("a.") for text in origins)


@pytest.mark.parametrize("edit", ["sliding_window(window = 2)", "linear_attention()"])
def test_other_operators_with_heads_take_the_norms_over(edit: str) -> None:
    compiled = grafted(model_of(NormedHeads(nn.LayerNorm)), edit)
    (new,) = compiled.plan.edits[0].new
    assert new.arguments["qk_norm"] == "layer_norm"
    origins = {o.parameter: o.text for o in compiled.plan.steps[0].origins}
    assert {t for n, t in origins.items() if n.endswith("q_norm.weight")} == {"a.q_norm"}


@pytest.mark.parametrize(
    ("module", "edit", "code", "says"),
    [
        (Bent, "attention()", "G363", "`tanh`, which `attention` does not do"),
        (UnitLength, "sliding_window(window = 2)", "G354", "would drop the norms of q and k"),
        (
            lambda: NormedHeads(nn.LayerNorm),
            "attention(qk_norm = none)",
            "G354",
            "would drop the norms",
        ),
        (TokensFirst, "hyena_x()", "G364", "has its tokens before its batch"),
    ],
)
def test_what_it_cannot_be_is_refused(module: Any, edit: str, code: str, says: str) -> None:
    with pytest.raises(GraftError) as caught:
        grafted(model_of(module()), edit)
    found = caught.value.diagnostics[0]
    assert found.code == code
    assert says in found.message
    assert "attention" in (found.site or "")


def test_norms_are_dropped_where_the_rule_says_so() -> None:
    compiled = grafted(model_of(UnitLength()), "attention()", "drop qk_norm")
    assert compiled.plan.edits[0].new[0].arguments["qk_norm"] == "none"


def test_an_operator_without_heads_has_no_norms_to_keep() -> None:
    grafted(model_of(NormedHeads(nn.LayerNorm)), "hyena_x(causal = false)")
