"""The build directory: whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import graftc.emit.files as files
import graftc.emit.package as package
from graftc.diagnostics import GraftError
from graftc.emit.build import Build, weights_of, write_build
from graftc.emit.package import save_state
from tests.emit.conftest import Case, run, same


def write(c: Case, folder: Path, note: str = "first", **options) -> Build:
    return write_build(
        folder, student=c.program, teacher=c.program, plan={"sites": []}, targets={"version": 1, "sites": []},
        manifest={"note": note, "path": Path("a.graft")}, copy_teacher=True, **options,
    )  # fmt: skip


def left_beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p != folder)


def test_round_trip(case, tmp_path):
    c = case("gpt")
    build = write(c, tmp_path / "out" / "b")
    assert sorted(p.name for p in build.path.iterdir()) == [
        "manifest.yaml", "plan.yaml", "student", "targets.yaml", "teacher"
    ]  # fmt: skip
    assert build.manifest["note"] == "first"
    assert build.manifest["facts"]["dynamic"] == {"batch": 2}
    assert set(build.manifest["versions"]) >= {"graftc", "torch", "python"}
    assert build.manifest["weights"]["student"] == build.manifest["weights"]["teacher"]
    assert build.plan == {"sites": []}
    assert build.targets["version"] == 1
    for model in (build.student(), build.teacher()):
        assert same(run(model, c.inputs), run(c.emitted, c.inputs))
    assert left_beside(build.path) == []


def test_the_same_build_twice_is_the_same_to_the_byte(case, tmp_path):
    a, b = write(case("gpt"), tmp_path / "a"), write(case("gpt"), tmp_path / "b")
    for file in a.path.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (b.path / file.relative_to(a.path)).read_bytes(), file


def test_linked_teacher_is_made_by_model(tmp_path):
    from graftc.program.capture import capture
    from graftc.program.model import load_model

    (tmp_path / "m.py").write_text(
        "import torch\ndef teacher():\n    torch.manual_seed(SEED)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4)), {'input': torch.ones(2, 4)}\n"
        "SEED = 0\n"
    )
    reference = f"{tmp_path}/m.py:teacher"
    model = load_model(reference)
    program = capture(model)
    build = write_build(
        tmp_path / "b",
        student=program,
        teacher=program,
        plan={},
        targets={},
        manifest={},
        model=reference,
    )
    assert same(run(build.teacher(), model.inputs), run(model.module, model.inputs))
    other = load_model(reference).module
    other[0].weight.data.add_(1)
    with pytest.raises(GraftError, match="have changed"):
        build.teacher(other)


@pytest.mark.parametrize("step", ["save_state", "write_text", "_sync_tree", "_swap"])
def test_a_full_disk_leaves_the_old_build_whole(case, tmp_path, monkeypatch, step):
    c = case("gpt")
    build = write(c, tmp_path / "b")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package if step == "save_state" else files, step, full)
    with pytest.raises(GraftError, match="No space left") as error:
        write(c, tmp_path / "b", note="second")
    assert error.value.diagnostics[0].code == "G611"
    monkeypatch.undo()
    assert Build.open(build.path).manifest["note"] == "first"
    assert same(run(Build.open(build.path).student(), c.inputs), run(c.emitted, c.inputs))
    assert left_beside(build.path) == []
    assert write(c, tmp_path / "b", note="second").manifest["note"] == "second"


def test_a_full_disk_leaves_nothing_where_nothing_was(case, tmp_path, monkeypatch):
    monkeypatch.setattr(
        package, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(GraftError):
        write(case("gpt"), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import graftc.emit.files as files
target, at = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename
count = 0
def dying(self, other):
    global count
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return rename(self, other)
Path.rename = dying
with files.whole_directory(target, ours=lambda p: True) as partial:
    (partial / "new").write_text("new")
    if at == "-1":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("at", ["-1", "0", "1"])
def test_a_kill_leaves_one_whole_directory(tmp_path, at):
    target = tmp_path / "b"
    target.mkdir()
    (target / "old").write_text("old")
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), at], cwd=root)
    assert done.returncode == -signal.SIGKILL
    with files.whole_directory(tmp_path / "b", ours=lambda p: True) as partial:
        # What the killed run left is cleared, and the old folder stands again.
        assert [p.name for p in target.iterdir()] == ["old"]
        assert left_beside(target) == [partial.name]
        (partial / "third").write_text("third")
    assert [p.name for p in target.iterdir()] == ["third"]
    assert left_beside(target) == []


def test_what_is_no_build_is_not_overwritten(case, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(GraftError, match="holds something else"):
            write(case("gpt"), tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write(case("gpt"), tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(case, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(GraftError, match="cannot write"):
        write(case("gpt"), tmp_path / "b")
    tmp_path.chmod(0o700)


def test_opening_what_is_no_build(case, tmp_path):
    whole = write(case("gpt"), tmp_path / "whole").path

    def copy(name: str) -> Path:
        return shutil.copytree(whole, tmp_path / name)

    (tmp_path / "nothing").mkdir()
    without = copy("without")
    (without / "student" / "model.py").unlink()
    other = copy("other")
    manifest = yaml.safe_load((other / "manifest.yaml").read_text())
    (other / "manifest.yaml").write_text(yaml.safe_dump({**manifest, "graftc_build": 7}))
    broken = copy("broken")
    (broken / "plan.yaml").write_text("{{{")
    for name, code in [
        ("absent", "G630"), ("nothing", "G630"), ("without", "G612"), ("other", "G631"), ("broken", "G612")
    ]:  # fmt: skip
        with pytest.raises(GraftError) as error:
            Build.open(tmp_path / name)
        assert error.value.diagnostics[0].code == code


def a_run(build: Build, id: str, change: float, **info) -> None:
    folder = build.path / "runs" / id
    folder.mkdir(parents=True)
    state = weights_of(build.student())
    save_state({n: t + change if t.is_floating_point() else t for n, t in state.items()},
               folder / "student.safetensors")  # fmt: skip
    files.write_yaml(folder / "run.yaml", {"status": "finished", **info})


def test_runs(case, tmp_path):
    c = case("gpt")
    build = write(c, tmp_path / "b")
    assert build.runs() == []
    assert build.latest_run() is None
    a_run(build, "0001-distill", 0.5, stage="distill")
    a_run(build, "0002-finetune", 1.0, stage="finetune")
    a_run(build, "0003-finetune", 2.0, stage="finetune", status="running")
    assert [r.id for r in build.runs()] == ["0001-distill", "0002-finetune", "0003-finetune"]
    assert build.latest_run().id == "0002-finetune"
    assert build.latest_run("distill").id == "0001-distill"
    before = build.student().transformer.ln_f.weight
    assert (build.student("0002-finetune").transformer.ln_f.weight == before + 1.0).all()
    with pytest.raises(GraftError, match="no run `0009`") as error:
        build.student("0009")
    assert "0001-distill" in str(error.value)

    kept = write(c, build.path, note="again")  # the very same student: its runs are still its own
    assert [r.id for r in kept.runs()] == ["0001-distill", "0002-finetune", "0003-finetune"]
    with pytest.raises(GraftError, match="runs of another student"):
        write(case("shared"), build.path)
    assert Build.open(build.path).manifest["note"] == "again"
    assert write(case("shared"), build.path, drop_runs=True).runs() == []
