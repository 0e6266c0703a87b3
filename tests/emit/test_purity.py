"""A file keeps no state, changes no input and draws no numbers of its own: a model that does is refused, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.deploy.directory import export_module
from graftc.deploy.request import read_request
from graftc.diagnostics import GraftError
from graftc.emit.onnx import export_module as plain_file
from graftc.emit.package import write_package
from graftc.emit.purity import check_pure
from graftc.program.capture import capture


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


class Scales(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0].mul_(2)
        return x + 1


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Drops(nn.Module):
    """No dropout layer: attention that is told to drop."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


class Model(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([inner])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


CASES = {
    "state": (Counts(), "G673", "blocks.0.calls"),
    "batch norm that learns": (nn.BatchNorm1d(4).train(), "G673", "blocks.0."),
    "input": (Scales(), "G674", "`x`"),
    "noise": (Noise(), "G675", "randn_like"),
    "dropout": (Drops(), "G675", "attention"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_cannot_hold_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    inner, code, said = CASES[name]
    # Capture refuses these or leaves the write out: here is one that was written into a package by hand.
    program = capture(graftc.Model(Model(nn.Tanh()), {"x": torch.randn(2, 4, 16)}))
    config = write_package(program, tmp_path / "package")
    before = sorted(tmp_path.rglob("*"))
    request = read_request(config, dynamic="batch=1:2:2")
    for write in (
        lambda m: export_module(m, config, tmp_path / "out", request),
        lambda m: plain_file(m, config, tmp_path / "model.onnx"),
    ):
        student = Model(inner).train(inner.training)
        with pytest.raises(GraftError) as error:
            write(student)
        (found,) = error.value.diagnostics
        assert found.code == code
        assert said in found.message
        assert found.site == "blocks.0"
        assert "test_purity.py:" in found.notes[0].message
        assert found.help
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before


def test_the_rule_that_made_the_place_is_named() -> None:
    exported = torch.export.export(Model(Noise()), (torch.randn(2, 4),), strict=False)
    with pytest.raises(GraftError) as error:
        check_pure(exported, {"blocks.0": "noisy @ a.graft:3"})
    assert "noisy @ a.graft:3" in error.value.diagnostics[0].notes[-1].message


def test_dropout_that_is_off_and_work_on_a_tensor_of_its_own_are_no_fault() -> None:
    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.scaled_dot_product_attention(x, x, x)
            h += 1
            return self.norm(self.drop(h))

    exported = torch.export.export(Fine().eval(), (torch.randn(2, 4, 8),), strict=False)
    check_pure(exported, {})
    check_pure(exported.run_decompositions(), {})


@pytest.mark.parametrize("out", [True, False])
def test_complex_numbers_stay_inside(out: bool) -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if out else torch.view_as_real(x)

    exported = torch.export.export(Turned(), (torch.randn(2, 4, dtype=torch.complex64),))
    with pytest.raises(GraftError, match=r"G818(.|\n)*view_as_real"):
        check_pure(exported, {})

    class Real(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * 2)

    check_pure(torch.export.export(Real(), (torch.randn(2, 4, 2),)), {})
