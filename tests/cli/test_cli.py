"""The command line as its user meets it: exit codes, messages, JSON, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftc.cli.main import main

ROOT = Path(__file__).parents[2]
MODEL = f"{ROOT}/examples/digits/model.py:teacher"
HYENA = ROOT / "examples/digits/hyena.graft"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_check_says_ok(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", str(HYENA), str(HYENA.with_name("hyena_and_pairs.graft")))
    assert code == 0
    assert out.count("ok") == 2


def test_check_points_at_the_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.graft"
    file.write_text(HYENA.read_text().replace("hyena_x(", "hyena_xx("))
    code, _, err = run(capsys, "check", str(file))
    assert code == 1
    assert "hyena_x" in err
    assert "^^^^^^^" in err
    code, out, _ = run(capsys, "check", str(file), "--format", "json")
    found = json.loads(out)["diagnostics"][0]
    assert code == 1
    assert found["span"]["line"] == 8
    assert "hyena_x" in found["help"]


def test_missing_and_empty_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "check", str(tmp_path / "no.graft"))[0] == 1
    (tmp_path / "empty.graft").write_text("")
    code, _, err = run(capsys, "check", str(tmp_path / "empty.graft"))
    assert code == 1
    assert "no rules" in err


def test_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "plan", str(HYENA))[0] == 2
    assert run(capsys, "plan", str(HYENA), "-m", MODEL, "--set", "middle")[0] == 2
    assert run(capsys, "plan", str(HYENA), "-m", MODEL, "--format", "xml")[0] == 2
    assert run(capsys, "nonsense")[0] == 2


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", MODEL)
    assert code == 0
    assert "chain `blocks`: 8 blocks" in out
    assert out.count("self_attention") == 8
    code, out, _ = run(capsys, "inspect", MODEL, "--format", "json")
    assert len(json.loads(out)["chains"][0]["blocks"]) == 8


def test_plan_writes_yaml_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "plan", str(HYENA), "-m", MODEL, "-o", str(tmp_path / "plan.yaml"))
    assert code == 0, err
    assert "blocks.7.attn" in out
    assert "hyena.graft:8:5" in out
    assert (tmp_path / "plan.yaml").read_text().startswith("version: 1")


def test_set_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", str(HYENA), "-m", MODEL, "--set", "which=1..5")
    assert code == 1
    assert "expected 4" in err
    code, _, err = run(capsys, "plan", str(HYENA), "-m", MODEL, "--set", "wich=1..5")
    assert code == 1
    assert "which" in err


def test_compile_leaves_nothing_behind_on_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.graft"
    bad.write_text(
        HYENA.read_text().replace("set which = 1..7", "").replace("which step 2", "{30}")
    )
    code, _, err = run(capsys, "compile", str(bad), "-m", MODEL, "-o", str(tmp_path / "out"))
    assert code == 1
    assert "30" in err
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.graft"]


def test_a_model_that_raises_shows_the_users_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def net():\n    return missing_name\n")
    code, _, err = run(capsys, "inspect", f"{file}:net")
    assert code == 1
    assert "broken.py:2" in err
    assert "missing_name" in err


def test_a_folder_that_is_no_build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in (["export"], ["verify"], ["distill", "-d", "x.py:f"]):
        code, _, err = run(capsys, verb[0], str(tmp_path), *verb[1:])
        assert code == 1, verb
        assert "no build" in err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "torch" in out
    assert "onnxruntime" in out


def test_doctor_sees_both_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftc import environment

    monkeypatch.setattr(environment, "_version", lambda package: "1.20.0")
    found = environment._runtime()
    assert found["state"] == "problem"
    assert "both installed" in found["detail"]


@pytest.mark.parametrize(
    "verb", [["check", str(HYENA)], ["fmt", "--check", str(HYENA)], ["--version"]]
)
def test_light_verbs_do_not_import_torch(verb: list[str]) -> None:
    script = (
        "import sys\nfrom graftc.cli.main import main\n"
        f"try:\n    main({verb!r})\nexcept SystemExit as s:\n    assert not s.code, s.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout


def test_import_adds_nothing_to_torch() -> None:
    script = (
        "import sys, graftc\nassert 'torch' not in sys.modules\nassert 'lark' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
