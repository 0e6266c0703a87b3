"""Where a model's weights and graphs come from: `--weights`, and a program that torch.export saved."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import graftc
from graftc.cli.commands import app
from graftc.diagnostics import GraftError
from graftc.emit.build import Build
from graftc.program.given_weights import load_weights
from graftc.program.model import load_model

MODEL = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.mlp = Mlp()

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)))

def make():
    torch.manual_seed(0)
    return Net().eval(), {"ids": torch.arange(6).reshape(2, 3)}
"""
RULE = "rule r {\n match m = mlp\n replace m with mlp(ratio = 3)\n}\n"


@pytest.fixture
def word(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "rules.graft").write_text(RULE)
    return f"{tmp_path}/model.py:make"


def other_weights(word: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with other weights, and the state that gives them: the tied weight under one of its names."""
    module = load_model(word).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    state = {k: v.clone() for k, v in module.state_dict().items() if k != "head.weight"}
    return module, state


def write(kind: str, folder: Path, state: dict[str, Tensor]) -> Path:
    if kind == "file":
        save_file(state, folder / "one.safetensors")
        return folder / "one.safetensors"
    if kind == "state dict":
        torch.save({"state_dict": state, "step": 3}, folder / "last.pt")
        return folder / "last.pt"
    shards = folder / "shards"
    shards.mkdir()
    names = sorted(state)
    where = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: state[n] for n in names if where[n] == file}, shards / file)
    if kind == "index":
        (shards / "stale.safetensors").write_bytes(b"")  # which the index does not name
        index = {"weight_map": where}
        (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    return shards


@pytest.mark.parametrize("kind", ["file", "state dict", "folder", "index"])
def test_a_build_has_the_weights_that_were_given(kind: str, word: str, tmp_path: Path) -> None:
    module, state = other_weights(word)
    where = write(kind, tmp_path, state)
    command = ["compile", f"{tmp_path}/rules.graft", "-m", word, "--weights", str(where)]
    done = CliRunner().invoke(app, [*command, "-o", f"{tmp_path}/build"])
    assert done.exit_code == 0, done.output
    build = Build.open(tmp_path / "build")
    ids = torch.arange(6).reshape(2, 3)
    with (
        torch.no_grad()
    ):  # the teacher is found again with these weights; new neurons start at zero
        assert torch.equal(build.teacher()(ids), module(ids))
        torch.testing.assert_close(build.student()(ids), module(ids))
    assert build.manifest["model_weights"]["sha256"]


def test_given_weights_keep_ties_dtype_and_memory(word: str, tmp_path: Path) -> None:
    _, state = other_weights(word)
    file = write("file", tmp_path, {n: v.bfloat16() for n, v in state.items()})
    module = load_model(word).module
    before = {n: p.data_ptr() for n, p in module.named_parameters()}
    load_weights(module, file)
    assert module.head.weight is module.embed.weight  # type: ignore[union-attr]
    assert {n: p.data_ptr() for n, p in module.named_parameters()} == before
    assert module.embed.weight.dtype == torch.float32  # type: ignore[union-attr]
    expected = state["embed.weight"].bfloat16().float()
    assert torch.equal(module.embed.weight, expected)  # type: ignore[arg-type]


WRONG = {
    "G801": lambda s: {n: v for n, v in s.items() if n != "mlp.up.bias"},
    "G802": lambda s: s | {"extra": torch.zeros(1)},
    "G803": lambda s: s | {"mlp.up.weight": torch.zeros(13, 6)},
}


@pytest.mark.parametrize("code", list(WRONG))
def test_weights_that_do_not_fit_are_told_by_plan_and_change_nothing(
    code: str, word: str, tmp_path: Path
) -> None:
    _, state = other_weights(word)
    file = write("file", tmp_path, WRONG[code](state))
    with pytest.raises(GraftError, match=code):
        graftc.plan(tmp_path / "rules.graft", word, weights=file)
    module = load_model(word).module
    before = {n: p.clone() for n, p in module.named_parameters()}
    with pytest.raises(GraftError, match=code):
        load_weights(module, file)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_a_prefix_of_all_names_is_told(word: str, tmp_path: Path) -> None:
    _, state = other_weights(word)
    file = write("file", tmp_path, {f"model.{n}": v for n, v in state.items()})
    with pytest.raises(GraftError, match=r"G801(.|\n)*begin with `model\.`"):
        graftc.inspect(word, weights=file)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled",))


def test_what_is_no_weights_is_told(word: str, tmp_path: Path, capsys) -> None:
    module = load_model(word).module
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "index").mkdir()
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "index/model.safetensors.index.json").write_text(json.dumps(index))
    for name, code in {"evil.pt": "G804", "half.safetensors": "G804", "empty": "G800",
                       "index": "G800", "nowhere": "G800"}.items():  # fmt: skip
        with pytest.raises(GraftError, match=code):
            load_weights(module, tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out


def test_a_wrong_rule_is_told_before_any_weight_is_read(word: str, tmp_path: Path) -> None:
    (tmp_path / "no.graft").write_text(RULE.replace("match m = mlp", "match m = self_attention"))
    _, state = other_weights(word)
    file = write("file", tmp_path, state)
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"  # not a number, which reading would tell (G207)
    file.write_bytes(content)
    for rules, code in (("no.graft", "G124"), ("rules.graft", "G207")):
        with pytest.raises(GraftError, match=code):
            graftc.compile(tmp_path / rules, word, tmp_path / "build", weights=file)


def saved(word: str, folder: Path, *, dynamic: bool = True) -> tuple[str, nn.Module]:
    model = load_model(word)
    shapes = {"ids": {0: torch.export.Dim("n")}} if dynamic else None
    exported = torch.export.export(
        model.module, tuple(model.inputs.values()), dynamic_shapes=shapes, strict=False
    )
    torch.export.save(exported, folder / "net.pt2")
    return str(folder / "net.pt2"), model.module


def test_a_saved_program_is_edited_like_its_model(word: str, tmp_path: Path) -> None:
    file, module = saved(word, tmp_path)
    analysis = graftc.inspect(file)
    assert [s.path for s in analysis.of_role("mlp")] == ["mlp"]
    assert analysis.program.classes["mlp"].endswith("Mlp")
    command = ["compile", f"{tmp_path}/rules.graft", "-m", file, "-o", f"{tmp_path}/build"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    build = Build.open(tmp_path / "build")
    ids = torch.arange(15).reshape(5, 3) % 7  # another batch than the example's
    with torch.no_grad():
        assert torch.equal(build.teacher()(ids), module(ids))
        torch.testing.assert_close(build.student()(ids), module(ids))
    student = build.student()
    assert student.head.weight is student.embed.weight  # type: ignore[union-attr]


def test_sizes_that_a_saved_program_fixed_are_told(word: str, tmp_path: Path) -> None:
    file, _ = saved(word, tmp_path, dynamic=False)
    assert "every size fixed" in graftc.inspect(file).program.facts.notes[0]


def test_what_is_no_saved_program_is_told(word: str, tmp_path: Path) -> None:
    file, _ = saved(word, tmp_path)
    (tmp_path / "text.pt2").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("other/data.txt", "nothing")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "broken.pt2", "w") as new:
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, text[: len(text) // 2] if name.endswith("model.json") else text)
    for name in ("nowhere", "text", "other", "broken"):
        with pytest.raises(GraftError, match="G805"):
            graftc.inspect(f"{tmp_path}/{name}.pt2")


@pytest.mark.parametrize("place", ["weight_0", "sample_inputs/model.pt"])
def test_what_is_pickled_in_a_saved_program_is_refused(
    word: str, place: str, tmp_path: Path, capsys
) -> None:
    file, _ = saved(word, tmp_path)
    pickled = io.BytesIO()
    torch.save(Evil(), pickled)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("weights_config.json") and place == "weight_0":
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config).encode()
            new.writestr(name, pickled.getvalue() if name.endswith(place) else content)
    with pytest.raises(GraftError, match="G806"):
        graftc.inspect(f"{tmp_path}/evil.pt2")
    assert "unpickled" not in capsys.readouterr().out
