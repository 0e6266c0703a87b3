"""The package on disk: it lives without graftc, and says what is wrong with it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from graftc.diagnostics import GraftError
from graftc.emit.examples import index_limits
from graftc.emit.files import state_hash
from graftc.emit.package import load_package, write_package
from graftc.program.capture import capture
from graftc.program.model import Model
from tests.emit.conftest import run, same

ALONE = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("graftc", "diffusers", "transformers", "yaml"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
from safetensors.torch import load_file, save_file
import model
torch.set_num_threads(1)
m = model.load()
with torch.no_grad():
    out = m(**load_file(sys.argv[2]))
out = out if isinstance(out, torch.Tensor) else out[0]
save_file({"out": out.contiguous()}, sys.argv[3])
"""


@pytest.mark.parametrize("name", ["dit", "gpt"])
def test_runs_in_an_environment_without_graftc(case, name, tmp_path):
    c = case(name)
    package = shutil.copytree(c.directory, tmp_path / "elsewhere")
    save_file({k: v.contiguous() for k, v in c.inputs.items()}, tmp_path / "in.safetensors")
    arguments = [str(package), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], run(c.emitted, c.inputs)[0])


def test_shared_tensors_are_stored_once(case):
    c = case("gpt")
    stored = load_file(c.directory / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert "transformer.h.0.attn.mask" in stored  # not in the state dict, but part of the model
    config = yaml.safe_load((c.directory / "config.yaml").read_text())
    assert config["weights"]["ties"] == {"lm_head.weight": "transformer.wte.weight"}
    assert config["inputs"] == [
        {"name": "tokens", "shape": ["batch", 9], "dtype": "int64", "meaning": "other"}
    ]
    assert config["facts"]["mode"] == "eval"


def test_other_weights_are_laid_over_the_packages_own(case, tmp_path):
    c = case("gpt")
    state = {k: v + 1 for k, v in c.emitted.state_dict().items() if k != "lm_head.weight"}
    save_file(state, tmp_path / "run.safetensors")
    loaded = load_package(c.directory, tmp_path / "run.safetensors")
    assert torch.equal(loaded.lm_head.weight, c.emitted.lm_head.weight + 1)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.transformer.h[0].attn.mask, c.emitted.transformer.h[0].attn.mask)


def broken(case, tmp_path, change) -> GraftError:
    package = shutil.copytree(case("gpt").directory, tmp_path / "package")
    change(package)
    with pytest.raises(GraftError) as error:
        load_package(package)
    return error.value


def test_damaged_packages(case, tmp_path):
    def without(file):
        return lambda p: (p / file).unlink()

    def fewer(p):
        tensors = load_file(p / "model.safetensors")
        tensors.pop("transformer.ln_f.weight")
        save_file({k: v.clone() for k, v in tensors.items()}, p / "model.safetensors")

    def longer(p):
        tensors = {k: v.clone() for k, v in load_file(p / "model.safetensors").items()}
        save_file({**tensors, "transformer.ln_f.weight": torch.zeros(7)}, p / "model.safetensors")

    def truncated(p):
        whole = (p / "model.safetensors").read_bytes()
        (p / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def another_version(p):
        text = (p / "config.yaml").read_text()
        (p / "config.yaml").write_text(text.replace("graftc_package: 1", "graftc_package: 99"))

    for i, (change, code, words) in enumerate([
        (without("model.py"), "G612", "missing"),
        (without("config.yaml"), "G612", "missing"),
        (without("model.safetensors"), "G622", "no such weights"),
        (fewer, "G622", "transformer.ln_f.weight"),
        (longer, "G622", "(7,)"),
        (truncated, "G622", "do not fit"),
        (another_version, "G621", "99"),
    ]):  # fmt: skip
        error = broken(case, tmp_path / str(i), change)
        assert error.diagnostics[0].code == code, str(error)
        assert words in str(error)


def test_linked_weights(case, tmp_path):
    c = case("gpt")
    write_package(c.program, tmp_path / "p", weights="link", link="here.py:teacher")
    assert not (tmp_path / "p" / "model.safetensors").exists()
    with pytest.raises(GraftError, match="only their hash"):
        load_package(tmp_path / "p")
    for state in (c.model.module, lambda: c.model.module):
        loaded = load_package(tmp_path / "p", state=state)
        assert same(run(loaded, c.inputs), run(c.emitted, c.inputs))
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    changed = dict(c.model.module.state_dict()) | dict(c.model.module.named_buffers())
    changed["transformer.ln_f.weight"] = changed["transformer.ln_f.weight"] + 1
    with pytest.raises(GraftError, match="have changed"):
        load_package(tmp_path / "p", state=changed)


def test_a_model_on_meta_has_no_weights_to_write(tmp_path):
    with torch.device("meta"):
        model = Model(nn.Linear(4, 4), {"input": torch.zeros(2, 4)})
    with pytest.raises(GraftError, match="meta device"):
        write_package(capture(model), tmp_path / "p")
    assert not (tmp_path / "p" / "model.py").exists()


def test_weights_in_half_precision_stay_so(tmp_path):
    model = Model(
        nn.Sequential(nn.Linear(4, 4), nn.SiLU()).bfloat16(),
        {"input": torch.zeros(2, 4).bfloat16()},
    )
    write_package(capture(model), tmp_path / "p")
    loaded = load_package(tmp_path / "p")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(run(loaded, model.inputs), run(model.module, model.inputs))


def test_state_hash_sees_names_values_and_dtypes():
    a = {"w": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}
    changes = [
        {**a, "w": torch.ones(4)},
        {**a, "w": torch.tensor([[1.0, 1.0], [1.0, 1.0000001]])},
        {**a, "b": torch.zeros(3, dtype=torch.float16)},
        {"v": a["w"], "b": a["b"]},
    ]
    assert len({state_hash(s) for s in [a, *changes]}) == 5
    assert state_hash(a) == state_hash({"b": a["b"].clone(), "w": torch.ones(2, 2).t()})


class Three(nn.Module):
    """Gives three results, of which its callers take two (AuraFlow's adaptive norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shift, scale, gate = self.linear(x).chunk(3, dim=-1)
        return x * scale, shift + x, gate


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Three() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x, _, gate = part(x)
            x = x * gate
        return x


def test_a_result_that_no_caller_takes(tmp_path):
    model = Model(Takes().eval(), {"x": torch.randn(2, 3, 8)})
    write_package(capture(model), tmp_path)
    found = load_package(tmp_path)
    with torch.no_grad():
        assert torch.allclose(found(**model.inputs), model.module(**model.inputs), atol=1e-6)


class Table(nn.Embedding):
    """A table with a forward of its own (Gemma 3's words)."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(words, self.weight) * 2


def test_indices_are_drawn_from_the_rows_of_any_table(tmp_path):
    model = Model(
        nn.Sequential(Table(7, 8), nn.Linear(8, 4)).eval(), {"input": torch.randint(0, 7, (2, 3))}
    )
    config = write_package(capture(model), tmp_path)
    assert index_limits(config, load_package(tmp_path)) == {"input": 7}
