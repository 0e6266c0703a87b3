"""Operators of a Python file: `python("ops.py:Class")`, from the rule to a package that runs without the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftc
from graftc.cli.main import main
from graftc.compiler import compile_model
from graftc.diagnostics import Diagnostic, GraftError
from graftc.emit.package import load_package
from graftc.language.check import check
from graftc.program.model import Model
from graftc.rewrite.user_files import bind
from tests.rewrite.models import tiny

OPS = '''
"""Two mixers."""
import torch
from torch import nn

SCALE = 0.5


def gated(x):
    return torch.sigmoid(x) * SCALE


class Mixer(nn.Module):
    """A gated depthwise convolution over the tokens."""

    def __init__(self, dim, kernel=4, causal: bool = False):
        super().__init__()
        self.kernel, self.causal = kernel, causal
        self.into = nn.Linear(dim, dim)
        self.taps = nn.Parameter(torch.randn(dim, kernel))
        self.register_buffer("sign", torch.randn(dim).sign())
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        pads = (self.kernel - 1, 0) if self.causal else (self.kernel // 2, (self.kernel - 1) // 2)
        y = nn.functional.pad((self.into(x) * self.sign).transpose(1, 2), pads)
        y = nn.functional.conv1d(y, self.taps.unsqueeze(1), groups=x.shape[2])
        return self.out(gated(y.transpose(1, 2)))


class Grid(nn.Module):
    """Mixes by a matrix, so that it takes one token count."""

    def __init__(self, dim, tokens: int):
        super().__init__()
        self.mix = nn.Linear(tokens, tokens, bias=False)

    def forward(self, x):
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class Channels(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.map = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return self.map(x * torch.ones(x.shape[2]))  # made in forward, on no device


class Raises(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.wide = nn.Linear(dim, dim + 1)

    def forward(self, x):
        y = self.wide(x)
        return x + y  # the line


class Wider(Raises):
    def forward(self, x):
        return self.wide(x)


class OneBatch(nn.Module):
    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return x + torch.ones(3, 1, x.shape[2])


class Decides(nn.Module):
    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x  # decides


class Refuses(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        raise RuntimeError(f"{heads} heads of {dim}")  # refuses


class Wants(nn.Module):
    def __init__(self, dim, flavour):
        super().__init__()


def function(x):
    return x
'''
DIM, TOKENS = 16, 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ops.py").write_text(OPS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rule(
    operator: str, more: str = "", name: str = "r.graft", match: str = "self_attention"
) -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"rule r {{\n    match   a = {match} in blocks {{1, 2}}\n    replace a with {operator}\n{more}}}\n"
    )
    return path


def refused(
    file: Path, model: Model | None = None, allow: tuple[str, ...] = ("ops.py",)
) -> Diagnostic:
    with pytest.raises(GraftError) as caught:
        graftc.plan(file, model or tiny(), allow_python=allow)
    return caught.value.diagnostics[0]


def test_nothing_runs_without_the_flag(folder: Path) -> None:
    Path("ops.py").write_text("raise SystemExit('this must not run')\n")
    file = rule('python("ops.py:Mixer")')
    for verb in (graftc.plan, graftc.explain):
        with pytest.raises(GraftError) as caught:
            verb(file, tiny())
        (found,) = caught.value.diagnostics
        assert found.code == "G430"
        assert found.help == "if you trust the file, write `--allow-python ops.py`"
        assert found.span is not None
        assert found.span.text == 'python("ops.py:Mixer")'


def test_the_plan_counts_parameters_and_flops(folder: Path) -> None:
    plan = graftc.plan(rule('python("ops.py:Mixer", kernel = 3)'), tiny(), allow_python=["ops.py"])
    step = plan.steps[0]
    assert step.after.params == 2 * (DIM * DIM + DIM) + DIM * 3
    assert step.after.flops == 2 * TOKENS * (2 * DIM * DIM + DIM * 3)
    assert {(o.parameter.rpartition("attn.")[2], o.text) for o in step.origins} == {
        ("taps", "random"), ("into.weight", "random"), ("into.bias", "random"),
        ("out.weight", "random"), ("out.bias", "random"),
    }  # fmt: skip
    assert step.edit.new[0].arguments == {"dim": DIM, "kernel": 3, "causal": False}


def test_the_package_runs_without_the_file(folder: Path) -> None:
    model, x = tiny(), torch.randn(3, TOKENS, DIM)
    build = graftc.compile(
        rule('python("ops.py:Mixer")'), model, folder / "build", allow_python=["ops.py"]
    )
    assert list(build.manifest["rules"]["python"]) == [str(folder / "ops.py")]
    made = compile_model(bind(check(Path("r.graft")), ["ops.py"]), model).student.root
    Path("ops.py").unlink()
    with torch.no_grad():
        assert torch.equal(load_package(build.path / "student")(x), made(x)[0])
    script = (
        "import sys; sys.path.insert(0, 'build/student'); import model, torch; m = model.load();"
        "print(tuple(m(torch.zeros(2, 12, 16)).shape), 'graftc' in sys.modules)"
    )
    clean = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, cwd=folder
    )
    assert clean.stdout.strip() == "(2, 12, 16) False"


def test_first_weights_are_the_constructors_own_under_the_seed(folder: Path) -> None:
    file = rule('python("ops.py:Mixer")')

    def weights(seed: int) -> dict[str, torch.Tensor]:
        student = compile_model(bind(check(file), ["ops.py"]), tiny(), seed).student
        one, two = (student.module(f"blocks.{i}.attn").state_dict() for i in (1, 2))
        return one | {f"2.{k}": v for k, v in two.items()}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["taps"], other["taps"])
    assert not torch.equal(first["taps"], first["2.taps"])
    assert not torch.equal(first["sign"], other["sign"])  # a buffer is drawn, too
    assert first["out.bias"].abs().max() == 0  # as the constructor left it
    assert first["taps"].std() > 0.5


def test_init_fills_its_slots(folder: Path) -> None:
    file = rule('python("ops.py:Mixer")', "    init    into = a.q\n            out = zero\n")
    model = tiny()
    build = graftc.compile(file, model, folder / "build", allow_python=["ops.py"])
    student = build.student()
    assert student.get_parameter("blocks.1.attn.out.weight").abs().max() == 0
    assert student.get_parameter("blocks.1.attn.taps").std() > 0.5
    teacher = model.module.get_parameter("blocks.1.attn.qkv.weight")
    assert torch.equal(student.get_parameter("blocks.1.attn.into.weight"), teacher[:DIM])
    assert refused(rule('python("ops.py:Mixer")', "    init    inot = a.q\n")).code == "G402"


def test_causality_is_told_by_running(folder: Path) -> None:
    model = tiny(causal=True)
    found = refused(rule('python("ops.py:Mixer")'), model)
    assert found.code == "G353"
    assert found.help == "write `Mixer(…, causal = true)`"
    graftc.plan(rule('python("ops.py:Mixer", causal = true)'), model, allow_python=["ops.py"])
    graftc.plan(rule('python("ops.py:Channels")'), model, allow_python=["ops.py"])
    assert refused(rule('python("ops.py:Grid")'), model).code == "G353"


def test_what_it_mixes_and_which_lengths_it_takes(folder: Path) -> None:
    specs = {}
    for name in ("Mixer", "Grid", "Channels"):
        plan = graftc.plan(rule(f'python("ops.py:{name}")'), tiny(), allow_python=["ops.py"])
        spec = plan.edits[0].new[0].spec
        specs[name] = (spec.mixes, spec.length)
    assert specs == {
        "Mixer": ("tokens", "free"),
        "Grid": ("tokens", "fixed"),
        "Channels": ("channels", "free"),
    }


@pytest.mark.parametrize(
    ("name", "code", "message", "line"),
    [
        ("Raises", "G433", "raised RuntimeError", "return x + y  # the line"),
        ("Refuses", "G433", "raised RuntimeError: 2 heads of 16", "# refuses"),
        ("Decides", "G433", "`Decides` cannot be traced", "# decides"),
        ("Wider", "G433", "returns another shape", None),
        ("OneBatch", "G433", "one batch size alone", None),
        ("Wants", "G351", "takes `flavour` from the site", None),
        ("function", "G432", "is no operator", None),
        ("Mixr", "G201", "has no `Mixr`", None),
    ],
)
def test_what_breaks_the_contract(
    folder: Path, name: str, code: str, message: str, line: str | None
) -> None:
    found = refused(rule(f'python("ops.py:{name}")'))
    assert found.code == code
    assert message in found.message
    assert found.span is not None
    assert found.span.text == f'python("ops.py:{name}")'
    if line is not None:
        assert any("ops.py" in n.message and line in n.message for n in found.notes)


def test_arguments_are_checked_against_the_constructor(folder: Path) -> None:
    found = refused(rule('python("ops.py:Mixer", kernal = 3)'))
    assert (found.code, found.help) == ("G103", "write `kernel`")
    assert refused(rule('python("ops.py:Mixer", kernel = wide)')).code == "G352"


def test_the_file_lies_in_the_folder_of_the_rules(folder: Path) -> None:
    file = rule('python("../ops.py:Mixer")', name="rules/r.graft")
    assert refused(file, allow=()).code == "G431"
    graftc.plan(file, tiny(), allow_python=["ops.py"])  # named where it lies
    Path("rules/link.py").symlink_to(folder / "ops.py")
    link = rule('python("link.py:Mixer")', name="rules/link.graft")
    assert refused(link, allow=("rules/link.py",)).code == "G431"
    graftc.plan(link, tiny(), allow_python=["ops.py"])
    assert refused(rule('python("none.py:Mixer")'), allow=("none.py",)).code == "G431"


def test_a_file_that_no_rule_names_is_told(folder: Path) -> None:
    file = Path("plain.graft")
    file.write_text("rule r {\n match b = block in blocks {1}\n skip b\n}\n")
    (note,) = graftc.plan(file, tiny(), allow_python=["ops.py"]).notes
    assert (note.code, note.severity) == ("G430", "note")
    assert "ops.py" in note.message


def test_a_changed_file_is_read_again(folder: Path) -> None:
    file = rule('python("ops.py:Channels")')
    before = graftc.plan(file, tiny(), allow_python=["ops.py"]).steps[0].after.params
    Path("ops.py").write_text(
        OPS.replace(
            "bias=False)\n\n    def forward(self, x):\n        return self.map",
            "bias=True)\n\n    def forward(self, x):\n        return self.map",
        )
    )
    after = graftc.plan(file, tiny(), allow_python=["ops.py"]).steps[0].after.params
    assert (before, after) == (DIM * DIM, DIM * DIM + DIM)


def test_beside_inserted_and_as_a_candidate(folder: Path) -> None:
    for edit in (
        'replace with parallel(a, python("ops.py:Mixer"), merge = sum)',
        'insert python("ops.py:Mixer") after a',
        'replace a with one of {keep, python("ops.py:Mixer")}',
    ):
        file = Path("e.graft")
        file.write_text(f"rule r {{\n match a = self_attention in blocks {{1}}\n {edit}\n}}\n")
        build = graftc.compile(file, tiny(), folder / "build", allow_python=["ops.py"])
        assert build.student()(torch.zeros(2, TOKENS, DIM)).shape == (2, TOKENS, DIM)


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.py").write_text(
        "from tests.rewrite.models import tiny\n\n\ndef model():\n    return tiny()\n"
    )
    file = str(rule('python("ops.py:Mixer")'))

    def said(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        return stopped.value.code or 0, "".join(capsys.readouterr())

    assert said("check", file)[0] == 0
    code, text = said("plan", file, "-m", "model.py:model")
    assert code == 1
    assert "--allow-python ops.py" in text
    code, text = said("plan", file, "-m", "model.py:model", "--allow-python", "ops.py")
    assert code == 0
    assert "Mixer()" in text  # what is as by default is not printed
