"""A cast to the dtype of a weight, in a model in which the module with that weight is replaced or removed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from graftc import verbs
from graftc.program.model import Model
from tests.conftest import small_dit


class Timed(nn.Module):
    """A linear that meets the sines of a timestep: made from constants, they are float32 whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.scale = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.mlp = (
            nn.LayerNorm(8),
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sines = torch.sin(t[:, None] * torch.arange(8, dtype=torch.float32))
        x = x + self.scale(self.time(sines))[:, None]
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Timed() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


def student(edit: str, folder: Path, model: Model | None = None) -> nn.Module:
    (folder / "a.graft").write_text(f"rule r {{\n match a = {edit}\n distill l2\n}}\n")
    given = model or Model(
        Stack().eval(), {"x": torch.randn(2, 5, 8), "t": torch.tensor([1.0, 7.0])}
    )
    return verbs.compile(folder / "a.graft", given, folder / "build").student()


def test_the_cast_follows_the_weights_of_the_new_module(tmp_path):
    found = student("linear in blocks {1}\n replace a with low_rank(rank = 4)", tmp_path)
    half = found.to(torch.bfloat16)
    given = {"x": torch.randn(2, 5, 8, dtype=torch.bfloat16), "t": torch.tensor([1.0, 7.0])}
    assert half(**given).dtype == torch.bfloat16


def test_without_the_module_there_is_nothing_to_cast_to(tmp_path):
    found = student('module "blocks.1.time"\n remove a', tmp_path)
    plain = Stack().eval()
    plain.blocks[1].time = Nothing()
    given = {"x": torch.randn(2, 5, 8), "t": torch.tensor([1.0, 7.0])}
    assert torch.allclose(found(**given), plain(**given), atol=1e-6)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_the_timestep_embedding_of_a_dit(tmp_path):
    model = small_dit(2)
    edit = "linear in blocks {1}\n replace a with low_rank(rank = 8)"
    found = student(edit, tmp_path, model)
    with torch.no_grad():
        assert found(**model.inputs).sample.isfinite().all()
