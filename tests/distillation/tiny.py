"""A tiny DiT as a package would hold it, its students, and a build around them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.distillation.targets import (
    Budget,
    Cut,
    CutInput,
    Loss,
    ModelInput,
    Pending,
    Site,
    Stage2,
    Targets,
)
from graftc.distillation.targets_file import to_dict

DIM, TOKENS, DEPTH = 16, 8, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Mixer(nn.Module):
    """What replaces an attention: a gated mix of each token with its neighbours, not causal."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(DIM, 2 * DIM)
        self.taps = nn.Parameter(torch.randn(3, DIM) / 3)
        self.out_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        near = [value.roll(i, dims=1) * self.taps[i + 1] for i in (-1, 0, 1)]
        return self.out_proj(gate.sigmoid() * (near[0] + near[1] + near[2]))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 2 * DIM)
        self.fc2 = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Alone(nn.Module):
    """An operator as a candidate's package holds it."""

    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn = Attention()
        self.mlp = Mlp()
        self.ada = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, gate = self.ada(c).unsqueeze(1).chunk(2, dim=-1)
        x = x + gate * self.attn(self.norm(x) + shift)
        return x + self.mlp(self.norm(x))


class TinyDiT(nn.Module):
    """x [B, 8, 16], t [B] -> [B, 8, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, DIM)
        self.register_buffer("position", torch.randn(TOKENS, DIM))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t)
        x = x + self.position
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


class Merge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * DIM, DIM)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.proj(torch.cat([a, b], dim=-1))


class PairedDiT(TinyDiT):
    """Blocks 2 and 3 side by side on the same input, merged."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks_merge = nn.ModuleList([Merge()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t)
        x = x + self.position
        x = self.blocks[0](x, c)
        x = self.blocks[1](x, c=c)
        left = self.blocks[2](x, c)
        right = self.blocks[3](x, c)
        x = self.blocks_merge[0](left, right)
        return self.head(x)


def teacher(seed: int = 0) -> TinyDiT:
    torch.manual_seed(seed)
    model = TinyDiT()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(3)  # attention that attends
    return model.eval()


def hyena(which: tuple[int, ...] = (1, 2)) -> nn.Module:
    """A copy of the teacher with some attentions replaced."""
    model = copy.deepcopy(teacher())
    torch.manual_seed(7)
    for i in which:
        model.blocks[i].attn = Mixer()
    return model


class Noisy(nn.Module):
    """Of train mode alone: dropout draws random numbers, and BatchNorm keeps what it saw in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2))


def noisy(student: nn.Module) -> nn.Module:
    """The student with dropout and BatchNorm in its first block."""
    student.blocks[0].norm = nn.Sequential(student.blocks[0].norm, Noisy())
    return student


def paired(which: tuple[int, ...] = ()) -> nn.Module:
    torch.manual_seed(7)
    model = PairedDiT()
    model.load_state_dict(teacher().state_dict(), strict=False)
    torch.manual_seed(7)
    for i in which:
        model.blocks[i].attn = Mixer()
    nn.init.normal_(model.blocks_merge[0].proj.weight, std=0.1)
    return model


def call(path: str, graph: str = "") -> Cut:
    """The cut of one call with one argument."""
    return Cut(graph, (CutInput("x", path, 0),), path)


def attention_site(block: int, *, solve: bool = False, **changes: Any) -> Site:
    path = f"blocks.{block}.attn"
    cut = call(path, f"blocks.{block}")
    pending = (Pending(path, "out_proj"),) if solve else ()
    given: dict[str, Any] = {
        "trainable": (path,),
        "operator": "mixer",
        "loss": Loss("l1"),
        "budget": Budget(steps=60),
    }
    return Site(path, cut, cut, pending=pending, **{**given, **changes})


def pair_site(*, after: tuple[str, ...] = (), **changes: Any) -> Site:
    inputs = (CutInput("x", "blocks.2", 0), CutInput("c", "blocks.2", 1))
    return Site(
        "blocks.2+blocks.3",
        Cut("", inputs, "blocks.3"),
        Cut("", inputs, "blocks_merge.0"),
        ("blocks.2", "blocks.3", "blocks_merge.0"),
        after=after,
        **{"budget": Budget(steps=60), **changes},
    )


INPUTS = (
    ModelInput("x", ("batch", TOKENS, DIM), "float32", "noisy_latent"),
    ModelInput("t", ("batch",), "int64", "timestep"),
)


def targets(*sites: Site, stage2: Stage2 | None = None) -> Targets:
    return Targets(INPUTS, sites, stage2 or Stage2(steps=30, batch=16, lr=1e-3, warmup=4, ema=0.9))


@dataclass
class FakeBuild:
    path: Path
    sites: Targets
    make_student: Any = hyena
    make_teacher: Any = teacher
    make_candidates: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.targets = to_dict(self.sites)

    def teacher(self) -> nn.Module:
        return self.make_teacher()

    def student(self, run: str | None = None) -> nn.Module:
        model = self.make_student()
        if run is not None:
            from safetensors.torch import load_file

            model.load_state_dict(load_file(self.path / "runs" / run / "student.safetensors"))
        return model

    def candidate(self, package: str) -> nn.Module:
        return Alone(self.make_candidates[package]())


@dataclass(frozen=True)
class Made:
    """A batch made ready."""

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: Any) -> Made:
        return self


class Denoise:
    """A task like rectified flow: predict the clean latent from a noisy one."""

    def prepare(self, sample: Any, generator: torch.Generator) -> Made:
        clean = sample["latent"]
        t = torch.randint(1000, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        share = (t.float() / 1000)[:, None, None]
        return Made({"x": (1 - share) * clean + share * noise, "t": t}, {"clean": clean})

    def loss(self, outputs: Any, prepared: Made) -> Tensor:
        return F.mse_loss(outputs, prepared.targets["clean"])

    def metrics(self, outputs: Any, prepared: Made) -> dict[str, float]:
        return {"mse": float(self.loss(outputs, prepared))}


def latents(count: int = 80) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(3)
    return [{"latent": torch.randn(TOKENS, DIM, generator=made)} for _ in range(count)]
