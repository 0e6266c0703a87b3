"""What `graftc doctor` finds on machines that are not this one."""

from __future__ import annotations

import sys

import pytest

from graftc import environment


def found(monkeypatch: pytest.MonkeyPatch, **versions: str) -> dict[str, tuple[str, str]]:
    """The findings where only these packages are installed (`_` in place of `-`)."""
    monkeypatch.setattr(environment, "_version", lambda p: versions.get(p.replace("-", "_")))
    return {f["what"]: (f["state"], f["detail"]) for f in environment.doctor()}


def test_no_runtime(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    said = found(monkeypatch, onnx="1.20")
    assert said["onnxruntime"][0] == "missing"
    assert said["rung: ONNX Runtime CPU"] == ("missing", "NOT RUN: needs pip install 'graftc[cpu]'")
    assert said["rung: checker, reference evaluator"][0] == "ok"


def test_packages_of_kernels_say_which_form_wants_them(monkeypatch):
    state, detail = found(monkeypatch)["mamba-ssm"]
    assert state == "missing"
    assert detail == "on a GPU alone, for mamba2(form = mamba_ssm): pip install mamba-ssm"
    assert found(monkeypatch, mamba_ssm="2.3.0")["mamba-ssm"] == ("ok", "2.3.0")


def test_both_runtimes(monkeypatch):
    said = found(monkeypatch, onnxruntime="1.20.0", onnxruntime_gpu="1.22.0")
    assert said["onnxruntime"][0] == "problem"
    assert "1.20.0" in said["onnxruntime"][1]
    assert "1.22.0" in said["onnxruntime"][1]


def test_a_runtime_that_does_not_load(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = found(monkeypatch, onnxruntime="1.20.0")
    assert said["onnxruntime"][0] == "problem"
    assert "does not load" in said["onnxruntime"][1]


def test_versions_of_tensorrt_and_a_machine_without_its_driver(monkeypatch):
    """The packages alone do not run an engine."""
    monkeypatch.setattr(
        environment, "_library", lambda what, *_: {"what": what, "state": "missing", "detail": ""}
    )
    said = found(monkeypatch, tensorrt="10.9.0", tensorrt_rtx="1.4.0", polygraphy="0.49")
    assert said["tensorrt"] == ("ok", "10.9.0")
    assert said["tensorrt-rtx"] == ("ok", "1.4.0")
    assert said["rung: TensorRT-RTX"][0] == "ok"
    assert said["rung: TensorRT engine"][0] == "missing"
