"""What a user gives wrongly, or a machine lacks: a diagnostic that says what to do, exit code 1 or 3, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.deploy.directory import export_module
from graftc.deploy.request import read_request
from graftc.deploy.scripts import verify as standalone
from graftc.diagnostics import GraftError
from graftc.emit.package import load_package, write_package
from graftc.program.capture import capture
from tests.deploy.test_export import run


@pytest.mark.parametrize("tolerance", ["-1", "0", "nan", "inf"])
def test_a_tolerance_that_is_none_is_refused(copy, tolerance, capsys):
    assert run("verify", str(copy), f"--tolerance={tolerance}") == 1
    assert "a number above 0" in capsys.readouterr().err
    command = [sys.executable, "verify.py", f"--tolerance={tolerance}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert (done.returncode, "tolerance" in done.stderr) == (1, True)


def test_the_file_in_place_of_the_directory(copy, capsys):
    assert run("verify", str(copy / "model.onnx")) == 1
    assert f"graftc verify {copy}" in capsys.readouterr().err.replace("\n", "")


def test_what_is_for_builds_is_not_passed_over_for_an_export(copy, capsys):
    assert run("verify", str(copy), "--onnx", str(copy / "model.onnx")) == 1
    assert run("verify", str(copy), "--data", "data.py:images") == 1
    assert capsys.readouterr().err.count("are for a build") == 2
    assert run("export", str(copy), "-o", str(copy.parent / "again")) == 1
    assert "is an export, no build" in capsys.readouterr().err
    assert not (copy.parent / "again").exists()


def test_one_file_holds_float32_alone(build, tmp_path, capsys):
    output = tmp_path / "student.onnx"
    assert run("export", str(build.path), "-o", str(output), "--precision", "fp16") == 1
    assert f"-o {tmp_path / 'student'}" in capsys.readouterr().err.replace("\n", "")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_cannot_run_a_file_is_exit_3(exported, capsys):
    """ONNX Runtime's CPU provider has no bfloat16 kernels."""
    folder = str(exported("bf16").path)
    assert run("bench", folder, "--against", str(exported("fp32").path)) == 3
    assert "ONNX Runtime does not run it" in capsys.readouterr().err


def test_an_unknown_provider_names_both_packages_where_both_are_installed(exported, monkeypatch):
    """They overwrite each other: the CPU package's files hide the CUDA provider."""
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    rungs = standalone.verify(exported("fp32").path, ep="cuda")
    (found,) = [r for r in rungs if r.name == "ONNX Runtime CUDA"]
    assert found.state == "NOT RUN"
    assert "keep one" in found.detail
    assert standalone.exit_code(rungs) == 3


class Volume(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.det(x.reshape(-1, 4, 4))[:, None, None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), Volume()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_an_operator_that_tensorrt_lacks_is_refused_with_site_and_rule(tmp_path):
    """ONNX has it: so `--to onnx` writes the file, and its manifest says what TensorRT would miss."""
    program = capture(graftc.Model(Model().eval(), {"x": torch.randn(2, 4, 4)}))
    config = write_package(
        program, tmp_path / "package", provenance={"blocks.1": "volume @ a.graft:4"}
    )
    student = load_package(tmp_path / "package")
    request = read_request(config, to="tensorrt", dynamic="batch=1:2:3")
    with pytest.raises(GraftError) as error:
        export_module(student, config, tmp_path / "trt", request)
    (found,) = error.value.diagnostics
    assert (found.code, found.site) == ("G668", "blocks.1, volume @ a.graft:4")
    assert "Det" in found.message
    assert not (tmp_path / "trt").exists()
    made = export_module(
        student, config, tmp_path / "out", read_request(config, dynamic="batch=1:2:3")
    )
    assert made.manifest["tensorrt"]["operators"]["state"] == "FAIL"
    assert "Det" in made.manifest["rungs"]["found"][1]["detail"]
