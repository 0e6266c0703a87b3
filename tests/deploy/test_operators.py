"""Every operator of the library as it is exported: alone, with dynamic batch and, where it takes them, tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftc.deploy.directory import export_module
from graftc.deploy.ladder import verify_export
from graftc.deploy.request import read_request
from graftc.operators.build import build
from graftc.operators.spec import OfSite, OperatorSpec
from graftc.operators.specs import SPECS

pytest.importorskip("onnxruntime")
TOKENS, DIM = 16, 32
FACTS = {
    "dim": DIM, "heads": 2, "kv_heads": 2, "head_dim": 16, "causal": False, "rotary": False, "grid_height": 4,
    "grid_width": 4, "activation": "gelu_tanh", "gated": False, "tokens": TOKENS, "in_features": DIM,
    "out_features": DIM, "eps": 1e-6, "affine": True,
}  # fmt: skip
REQUIRED = {"rank": 8, "window": 5, "radius": 1, "ratio": 2, "kernel": 3}
QUICK = ("linear_attention", "hyena_x", "mamba2")


def arguments(spec: OperatorSpec) -> dict:
    found = {}
    for arg in spec.args:
        value = REQUIRED[arg.name] if arg.required else arg.default
        found[arg.name] = (
            FACTS.get(value.fact, value.otherwise) if isinstance(value, OfSite) else value
        )
    if found.get("rotary") is False and any(
        a.name == "rotary" and a.kind == "symbol" for a in spec.args
    ):
        found["rotary"] = "none"
    return found


def exported(spec: OperatorSpec, folder: Path, precision: str = "fp32"):
    torch.manual_seed(0)
    module = build(spec, arguments(spec)).eval()
    free = spec.length == "free"
    port = {
        "name": "x",
        "shape": ["batch", "tokens" if free else TOKENS, DIM],
        "dtype": "float32",
        "meaning": "other",
    }
    facts = {
        "mode": "eval",
        "dtype": "float32",
        "dynamic": {"batch": 2, **({"tokens": TOKENS} if free else {})},
    }
    config = {"inputs": [port], "outputs": {"kind": "tensor", "names": []}, "facts": facts, "provenance": {},
              "versions": {"graftc": "0"}}  # fmt: skip
    dynamic = "batch=1:2:4" + (",tokens=8:16:33" if free else "")
    return export_module(
        module, config, folder, read_request(config, dynamic=dynamic, precision=precision)
    )


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n != "zero"],
)
def test_an_operator_alone(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    result = verify_export(exported(spec, tmp_path / "out"))
    failed = [r for r in result.rungs if r.state == "FAIL"]
    weightless = not arguments(spec)  # nothing to change, so no control can see it
    assert not [r for r in failed if not (weightless and "weight" in r.name)], failed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", [n for n in SPECS if n not in ("zero", "identity")])
def test_an_operator_in_halves(name: str, precision: str, tmp_path: Path) -> None:
    result = verify_export(exported(SPECS[name], tmp_path / "out", precision))
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]


def test_an_input_that_is_an_output_keeps_its_name(tmp_path: Path) -> None:
    """The exporter renames such an input; the server and the golden files know it by its own name."""
    import onnx

    proto = onnx.load(str(exported(SPECS["identity"], tmp_path / "out").model))
    assert [i.name for i in proto.graph.input] == ["x"]
    assert [o.name for o in proto.graph.output] == ["output"]
