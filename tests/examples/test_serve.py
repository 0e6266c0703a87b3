"""The exported digits model without graftc: a script, a service, and a page in a real browser."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy
import pytest
import torch

from graftc.emit.onnx import export_module
from graftc.emit.package import load_package, write_package
from graftc.program.analysis import Analysis
from graftc.program.model import load_model

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
SERVE = ROOT / "examples" / "serve"


def example(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"serve_{name}", SERVE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, digits: Analysis) -> Path:
    """The digits teacher, captured, printed and exported, as `graftc export` does."""
    folder = tmp_path_factory.mktemp("serve")
    config = write_package(digits.program, folder / "package")
    return export_module(load_package(folder / "package"), config, folder / "model.onnx")


def test_the_script_draws_what_the_task_draws(model: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    try:
        loaded = load_model(f"{ROOT}/examples/digits/model.py:teacher")
    finally:
        sys.path.pop(0)
    script = example("sample")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([3, 8])
    wanted = loaded.task.sample(
        loaded.module.eval(), count=2, generator=torch.Generator(), steps=5, labels=labels, noise=noise, guidance=2.0
    )  # fmt: skip
    found = script.sample(
        script.load(model), labels.numpy(), noise=noise.numpy(), steps=5, guidance=2.0
    )
    assert numpy.abs(found - wanted.numpy()).max() < 1e-3


def test_the_script_needs_no_torch_and_no_graftc(model: Path) -> None:
    code = f"import sys; sys.modules['torch'] = sys.modules['graftc'] = None; sys.path.insert(0, {str(SERVE)!r})\nimport sample\nsample.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), "--count", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) >= 8


@pytest.fixture(scope="module")
def address(model: Path):
    """The service, running."""
    pytest.importorskip("starlette")
    uvicorn = pytest.importorskip("uvicorn")
    service = example("service")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = service.application(service.load(model))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def ask(address: str, body: bytes):
    import json
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{address}/sample", data=body, method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_service_draws_and_refuses(address: str) -> None:
    status, found = ask(address, b'{"label": 3, "count": 2, "steps": 4}')
    assert status == 200
    assert numpy.asarray(found["images"]).shape == (2, 8, 8)
    assert ask(address, b'{"label": 3, "count": 2, "steps": 4}')[1] == found  # the seed decides
    for body, said in [
        (b"not json", "Expecting value"),
        (b"[]", "JSON object"),
        (b'{"label": 12}', "from 0 to 9"),
        (b'{"label": true}', "whole number"),
        (b'{"colour": 1}', "unknown field"),
    ]:
        status, found = ask(address, body)
        assert status == 422
        assert said in found["error"]


def test_the_page_draws_in_a_browser(address: str, tmp_path: Path) -> None:
    chromium = next(
        (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
    )
    if chromium is None:
        pytest.skip("no Chromium here")
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--virtual-time-budget=20000", "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert 'data-drawn="4"' in done.stdout, done.stderr[-2000:]
    assert done.stdout.count("<canvas") == 4
    assert 'aria-label="digit 7, drawing 1"' in done.stdout
