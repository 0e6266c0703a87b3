"""Roles, chains, parts and cost: from dataflow, with no table of architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.parts import PartRef, part_refs


def roles(analysis: Analysis, role: str) -> list[str]:
    return [s.path for s in analysis.of_role(role)]


def test_dit(dit: Analysis) -> None:
    assert [(c.name, len(c)) for c in dit.chains] == [("transformer_blocks", 4)]
    assert roles(dit, "self_attention") == [f"transformer_blocks.{i}.attn1" for i in range(4)]
    assert roles(dit, "mlp") == [f"transformer_blocks.{i}.ff" for i in range(4)]
    assert roles(dit, "cross_attention") == []


def test_pixart(pixart: Analysis) -> None:
    assert [(c.name, len(c)) for c in pixart.chains] == [("transformer_blocks", 4)]
    assert roles(pixart, "self_attention") == [f"transformer_blocks.{i}.attn1" for i in range(4)]
    assert roles(pixart, "cross_attention") == [f"transformer_blocks.{i}.attn2" for i in range(4)]
    assert "mask" in pixart.by_path["transformer_blocks.0.attn2"].has


def test_digits_facts(digits: Analysis) -> None:
    site = digits.by_path["blocks.3.attn"]
    assert {k: site.facts[k] for k in ("dim", "tokens", "heads", "head_dim", "causal")} == {
        "dim": 64, "tokens": 64, "heads": 4, "head_dim": 16, "causal": False,
    }  # fmt: skip
    n, d, h = 64, 64, 4
    assert site.facts["params"] == 4 * d * d + 4 * d
    assert site.facts["flops"] == 8 * n * d * d + 4 * n * n * d + 2 * h * n * n
    mlp = digits.by_path["blocks.3.mlp"]
    assert (mlp.facts["ratio"], mlp.facts["activation"]) == (4, "gelu_tanh")


class Interleaved(nn.Module):
    """q, k, v interleaved by head in one weight, softmax written out, a permuted output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 2, 3, 4).transpose(1, 2).unbind(3)
        p = torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1)
        return self.out((p @ v).transpose(1, 2).reshape(b, n, d))


def test_interleaved_projections_are_unpicked() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Interleaved())
    x = torch.randn(2, 5, 8)
    analysis = analyse(capture(Model(module, {"input": x})))
    assert roles(analysis, "self_attention") == ["0"]
    refs = part_refs(analysis, "0")
    net = module[0]
    assert isinstance(net, Interleaved)
    wanted = net.qkv(x).view(2, 5, 2, 3, 4)
    for i, name in enumerate(("q", "k", "v")):
        ref = refs[name]
        assert isinstance(ref, PartRef)
        weight, bias = ref.tensors(analysis.program)
        assert bias is not None
        assert torch.allclose(x @ weight.t() + bias, wanted[:, :, :, i].reshape(2, 5, 8), atol=1e-6)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_gated_mlp() -> None:
    analysis = analyse(capture(Model(nn.Sequential(Gated()), {"input": torch.randn(2, 5, 8)})))
    assert roles(analysis, "mlp") == ["0"]
    refs = part_refs(analysis, "0")
    assert {k: v.weight for k, v in refs.items() if isinstance(v, PartRef)} == {
        "gate": "0.gate.weight", "up": "0.up.weight", "down": "0.down.weight",
    }  # fmt: skip


def test_timestep_embedder_is_no_mlp(digits: Analysis) -> None:
    assert all(s.block is not None for s in digits.of_role("mlp"))


class PostNorm(nn.Module):
    """BERT's layout: the output projection stands with the residual and the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Core()
        self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x + self.dense(self.inner(x, mask)))


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).view(2, 5, 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(2, 5, 8)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PostNorm() for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


MASKED = Model(
    Masked(), {"x": torch.randn(2, 5, 8), "mask": torch.zeros(2, 1, 5, 5)}, dynamic={"x": {}}
)


def test_a_residual_or_norm_is_never_part_of_a_site() -> None:
    """The projection stands with the residual: it is taken out, and the two are one module of their own."""
    analysis = analyse(capture(MASKED))
    assert roles(analysis, "self_attention") == [f"layers.{i}.self_attention" for i in range(3)]
    site = analysis.by_path["layers.0.self_attention"]
    assert set(part_refs(analysis, site.path)) == {"q", "k", "v", "out"}
    assert "mask" in site.has
    assert site.kept["mask"].form == "additive"
    left = [n.target for n in analysis.program.module("layers.0").graph.nodes]  # type: ignore[union-attr]
    assert "norm" in left
    assert torch.ops.aten.add.Tensor in left


class WrittenOut(nn.Module):
    """nanoGPT's attention without flash: a causal mask by masked_fill."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("bias", torch.tril(torch.ones(5, 5)).view(1, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        scores = (q @ k.transpose(-2, -1)) * 0.5
        scores = scores.masked_fill(self.bias == 0, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8))


def site_of(module: nn.Module, x: Tensor) -> tuple[Analysis, str]:
    analysis = analyse(capture(Model(nn.Sequential(module), {"input": x}, dynamic={"input": {}})))
    return analysis, roles(analysis, "self_attention")[0]


def test_a_mask_that_hides_the_future_and_nothing_else_is_causal() -> None:
    analysis, path = site_of(WrittenOut(), torch.randn(2, 5, 8))
    site = analysis.by_path[path]
    assert site.has == {"causal"}
    assert site.facts["causal"] is True


def test_another_mask_of_written_out_attention_is_seen() -> None:
    module = WrittenOut()
    module.bias[..., 3, 0] = 0
    analysis, path = site_of(module, torch.randn(2, 5, 8))
    assert analysis.by_path[path].has == {"causal", "mask"}


def test_an_unusual_scale_is_a_fact_of_the_site() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
            return self.proj(y.transpose(1, 2).reshape(2, 5, 8))

    analysis, path = site_of(Scaled(), torch.randn(2, 5, 8))
    assert analysis.by_path[path].facts["scale"] == 1.0


def test_multihead_attention_with_weights() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=True)[0]

    analysis = analyse(
        capture(Model(Wrapped().train(), {"x": torch.randn(3, 5, 16)}, dynamic={"x": {}}))
    )
    (site,) = analysis.of_role("self_attention")
    assert (site.facts["heads"], site.facts["kv_heads"], site.facts["head_dim"]) == (2, 2, 8)


def test_flops_are_of_one_sample_whatever_is_dynamic_first() -> None:
    flops: set[int] = set()
    for dynamic in ({0: "batch", 1: "tokens"}, {1: "tokens", 0: "batch"}):
        model = Model(
            nn.Sequential(Gated()), {"input": torch.randn(2, 5, 8)}, dynamic={"input": dynamic}
        )
        flops.add(analyse(capture(model)).flops[""])
    assert flops == {3 * 2 * 5 * 8 * 16}
