"""A student where people train: half precision, torch.compile, activation checkpointing, FSDP2 by block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graftc
from graftc.emit.build import Build
from tests.installation.test_install import HYENA, build, dit, inputs, llama, tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Build:
    rules = HYENA.replace("\n drop rotary, mask", "")
    return build(tmp_path_factory.mktemp("student"), rules, dit(), inputs())


def generated(made: Build) -> nn.Module:
    return made.student()


def in_place(made: Build) -> nn.Module:
    model = dit()
    assert graftc.install(model, made).form == "modules"
    return model


FORMS = pytest.mark.parametrize("form", [generated, in_place])


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    return model(**given)[0]


def loss_of(model: nn.Module) -> Tensor:
    return run(model).square().mean()


def loss_of_tokens(model: nn.Module) -> Tensor:
    return model(input_ids=tokens())[0].square().mean()


def grads(model: nn.Module, loss: Callable[[nn.Module], Tensor] = loss_of) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    top = max(float(g.abs().max()) for g in b.values())
    return a.keys() == b.keys() and all(
        torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-5 * top) for n in b
    )


@FORMS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision(form: Any, dtype: torch.dtype, limit: float, made: Build) -> None:
    with torch.no_grad():
        wanted = run(form(made))
        found = run(form(made).to(dtype), dtype)
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() < limit * wanted.abs().max()


@FORMS
@pytest.mark.slow
def test_compiled_it_computes_and_learns_the_same(form: Any, made: Build) -> None:
    model = form(made)
    wanted = grads(model)
    whole = form is generated  # diffusers' own class logs, which breaks its graph
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    found = {n.removeprefix("_orig_mod."): g for n, g in grads(compiled).items()}  # type: ignore[arg-type]
    assert same(found, wanted)


@FORMS
def test_with_activations_computed_again(form: Any, made: Build) -> None:
    model = form(made)
    wanted = grads(model)
    calls: list[int] = []
    for block in model.get_submodule("transformer_blocks").children():
        forward = block.forward

        def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            def counted(*a: Any, **k: Any) -> Any:
                calls.append(1)
                return forward(*a, **k)

            return checkpoint(counted, *args, use_reentrant=False, **kwargs)

        block.forward = again  # type: ignore[method-assign]
    assert same(grads(model), wanted)
    assert len(calls) == 2 * 4  # each of four blocks, there and again on the way back


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "dit"])
def test_sharded_by_block_over_two_processes(kind: str, tmp_path: Path) -> None:
    """The DiT's final layer calls an embedder of the first block, which is then a unit of its own (docs/scale.md)."""
    tokens_in = {"input_ids": tokens(), "use_cache": False}
    rules = HYENA if kind == "llama" else HYENA.replace("\n drop rotary, mask", "")
    module, given = (llama(), tokens_in) if kind == "llama" else (dit(), inputs())
    made = build(tmp_path, rules, module, given)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    job = [str(ROOT / "tests/installation/fsdp_job.py"), str(made.path)]
    job += [str(tmp_path / "grads.pt"), kind]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *job], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    wanted = grads(generated(made), loss_of_tokens) if kind == "llama" else grads(in_place(made))
    assert same(found, wanted)
