"""The memory of an export: the weights once. The same in `benchmarks/export.py --xl` for DiT-XL/2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftc
from graftc.deploy.directory import Export
from graftc.deploy.ladder import verify_export
from graftc.emit.package import write_package
from graftc.program.capture import capture
from graftc.program.model import Reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

CHILD = """
import json, resource, sys
from pathlib import Path
import onnxscript.optimizer, onnxscript.rewriter.onnx_fusions, torch.onnx
import graftc.emit.files as files
from graftc.deploy import directory
from graftc.deploy.request import read_request
from graftc.emit.package import load_package

peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder, precision = Path(sys.argv[1]), sys.argv[2]
directory._EMBEDDED_LIMIT = 0  # as for a model above 1.8 GB
before = peak()
model = load_package(folder / "package")
weights = sum(4 * p.numel() for p in model.parameters())
config = files.read_yaml(folder / "package/config.yaml")
request = read_request(config, precision=precision, dynamic="batch=1:2:2")
directory.export_module(model, config, folder / precision, request)
print(json.dumps({"before": before, "peak": peak(), "weights": weights}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of three blocks of DiT-XL/2 on four tokens: 88 M parameters, and hardly anything else."""
    dit = Reference(f"{ROOT}/examples/dit_xl2/model.py:DiT").resolve()
    module = dit(size=4, depth=3).eval()
    for name, parameter in module.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = {"x": torch.randn(2, 4, 4, 4), "t": torch.tensor([5, 800]), "y": torch.tensor([1, 2])}
    folder = tmp_path_factory.mktemp("memory")
    write_package(capture(graftc.Model(module, inputs)), folder / "package")
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_holds_the_weights_once(folder, precision):
    command = [sys.executable, "-c", CHILD, str(folder), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    # Modules that are imported late, the graph and the activations are 0.15 of weights this small.
    assert found["peak"] - found["before"] < 1.5 * found["weights"], found
    export = Export.open(folder / precision)
    assert (export.path / "model.onnx.data").stat().st_size > 0.45 * found["weights"]
    result = verify_export(export)
    assert result.passed, [r for r in result.rungs if r.state == "FAIL"]
