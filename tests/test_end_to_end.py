"""The whole path through the command line, on the digits model, a few steps of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from graftc import verbs
from graftc.cli.main import main
from graftc.diagnostics import GraftError
from graftc.loading import task_of

ROOT = Path(__file__).parents[1]
MODEL = f"{ROOT}/examples/digits/model.py:teacher"
DATA = f"{ROOT}/examples/digits/data.py:images"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("builds") / "both"
    file = ROOT / "examples/digits/hyena_and_pairs.graft"
    assert run("compile", str(file), "-m", MODEL, "-o", str(folder)) == 0
    return folder


def test_a_build_says_what_made_it(build: Path) -> None:
    manifest = yaml.safe_load((build / "manifest.yaml").read_text())
    assert manifest["model"]["reference"] == MODEL
    assert len(manifest["model"]["sha256"]) == len(manifest["rules"]["sha256"]) == 64
    assert manifest["task"]["class"] == "graftc.tasks.ddpm.DDPM"  # the model's own
    assert len(manifest["task"]["sha256"]) == 64
    assert manifest["command"].startswith("graftc")
    assert manifest["versions"]["torch"] == torch.__version__
    assert {p.name for p in build.iterdir()} >= {"student", "teacher", "plan.yaml", "targets.yaml"}
    assert not list(build.rglob("*.pt")) + list(build.rglob("*.pkl"))


def test_distil_finetune_export_verify(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--steps", "3", "--batch", "16"]
    assert run("distill", str(build), "-d", DATA, *quick) == 0
    assert "0001-distill" in capsys.readouterr().out
    made_by = yaml.safe_load((build / "runs/0001-distill/run.yaml").read_text())["sources"]
    assert made_by["data"]["reference"] == DATA
    assert made_by["task"]["class"] == "graftc.tasks.ddpm.DDPM"
    assert run("finetune", str(build), "-d", DATA, *quick) == 0
    assert "0002-finetune" in capsys.readouterr().out
    assert run("export", str(build), "--to", "onnx") == 0
    assert run("verify", str(build), "-d", DATA) == 0
    said = capsys.readouterr().out
    assert "negative control" in said
    assert "FAIL" not in said


def test_the_printed_student_is_the_compiled_one(build: Path) -> None:
    """Bit for bit: the package on disk, and the student in memory."""
    from graftc.compiler import compile_model
    from graftc.emit.build import Build
    from graftc.language.check import check
    from graftc.program.model import load_model

    model = load_model(MODEL)
    compiled = compile_model(check(ROOT / "examples/digits/hyena_and_pairs.graft"), model)
    with torch.no_grad():
        wanted = compiled.student.root(*[model.inputs[p.name] for p in compiled.student.inputs])[0]
        found = Build.open(build).student()(**model.inputs)
    assert torch.equal(found, wanted)


def test_least_squares_at_compile_time_lowers_the_error(tmp_path: Path) -> None:
    file = tmp_path / "linear.graft"
    file.write_text(
        "rule r {\n match a = self_attention in blocks {1}\n replace a with token_linear()\n distill l2\n}\n"
    )
    errors: list[float] = []
    for data in (None, DATA):
        made = verbs.compile(file, MODEL, tmp_path / f"build{len(errors)}", data=data)
        assert bool(made.targets["sites"][0]["pending"]) is (data is None)
        model = verbs.load_data(f"{ROOT}/examples/digits/data.py:held_out")
        task = task_of(made, None)
        from graftc.distillation.data import open_data

        batch = open_data(model, seed=0, fraction=None, samples=None, validation=None).prepared(
            task, 0, 64, "test"
        )
        with torch.no_grad():
            teacher, student = made.teacher(), made.student()
            difference = student(**batch.inputs) - teacher(**batch.inputs)
        errors.append(float(difference.square().mean()))
    assert errors[1] < errors[0]


def test_data_that_does_not_fit(build: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.py"
    file.write_text(
        "import torch\n"
        "def no_label():\n    return [{'latent': torch.zeros(1, 8, 8)}] * 8\n"
        "def too_wide():\n    return [{'latent': torch.zeros(1, 9, 9), 'label': torch.tensor(1)}] * 8\n"
        "def nothing():\n    return []\n"
        "def breaks():\n    raise ValueError('disk gone')\n"
    )
    for name, said in (
        ("no_label", "label"),
        ("too_wide", "9"),
        ("nothing", ""),
        ("breaks", "disk gone"),
    ):
        with pytest.raises(GraftError) as caught:
            verbs.distill(build, f"{file}:{name}", steps=1)
        assert said in str(caught.value), name


def test_a_teacher_that_is_not_finite(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples/digits')!r})\n"
        "import dataclasses, torch, model\n"
        "def nan():\n"
        "    made = model.teacher()\n"
        "    with torch.no_grad():\n        made.module.blocks[1].mlp.fc1.weight[0, 0] = float('nan')\n"
        "    return made\n"
    )
    with pytest.raises(GraftError) as caught:
        verbs.compile(ROOT / "examples/digits/hyena.graft", f"{file}:nan", tmp_path / "out")
    assert "blocks.1.mlp.fc1.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()
