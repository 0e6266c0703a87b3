"""Patterns that are Python functions: `match python("f.py:g")` finds what the pattern written by hand finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler import compile_model
from graftc.diagnostics import Diagnostic, GraftError, Source
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.rewrite.match import match
from graftc.rewrite.user_files import bind

FILE = """
import torch
import torch.nn.functional as F


def attention(q, k, v, scale: float):
    p = torch.softmax((q @ k.transpose(-2, -1)) * scale, -1)
    return p @ F.dropout(v, 0.1, False)


def rms(x, w, eps: float):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w
    return y


def gated(x, w):
    up, gate = (x @ w).chunk(2, -1)
    return up * F.silu(gate)


def both(x, w, b=None):
    y = F.linear(x, w, b)
    z = F.gelu(y)
    return y, z


def sized(x):
    return x / x.shape[-1] ** 0.5


def derived(x, s: float):
    return x * (2 * s)


def unread(x, y):
    return torch.relu(x)


def returned(x, y):
    return torch.relu(x + y), x


def constant(x):
    return x + torch.arange(4.0)


def decides(x):
    return x if x.sum() > 0 else -x  # decides


def raises(x):
    return x @ "text"  # raises


def many(*xs):
    return xs[0]
"""

BY_HAND = {
    "attention": (
        "p = softmax(matmul(q, transpose(k, -2, -1)) * scale, -1)\n attention = matmul(p, v)",
        "attention = scaled_dot_product_attention(q, k, v, scale = scale)",
        "scale is number",
    ),
    "rms": (
        "y = x * rsqrt(mean(pow(x, 2), -1, true) + eps) * w",
        "y = rms_norm(x, [d], w, eps)",
        "eps is number, shape(w) ~ [d]",
    ),
    "gated": (
        "up, gate = split(matmul(x, w), 2)\n gated = up * silu(gate)",
        "gated = matmul(x, w)",
        "w is parameter",
    ),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(16))
        self.wide = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * (x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-5))
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + (torch.softmax(q @ k.mT * 0.25, -1) @ v).transpose(1, 2).flatten(2)
        up, gate = (x @ self.wide).chunk(2, -1)
        return x + torch.nn.functional.silu(gate) * up


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(Block(), Block()), {"input": torch.randn(2, 6, 16)})


@pytest.fixture(scope="module")
def analysis(model: Model) -> Analysis:
    return analyse(capture(model))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "f.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rule(name: str, python: bool) -> str:
    pattern, rewrite, where = BY_HAND[name]
    by = f'python("f.py:{name}")' if python else f"{{\n {pattern}\n}}"
    return f"rule r exact {{\n match {by}\n where {where}\n rewrite {{ {rewrite} }}\n}}\n"


def found(text: str, analysis: Analysis) -> list[dict[str, Any]]:
    (bound,) = bind(check(Source("r.graft", text)), ["f.py"] if "python(" in text else []).rules
    occurrences = [m.occurrence for m in match(bound, analysis).found]
    names = ("q", "k", "v", "scale", "x", "w", "eps")
    return [{n: v for n, v in o.names.items() if n in names} for o in occurrences if o is not None]


@pytest.mark.parametrize("name", BY_HAND)
def test_both_forms_give_the_same_matches(name: str, folder: Path, analysis: Analysis) -> None:
    by_hand, captured = (found(rule(name, python), analysis) for python in (False, True))
    assert captured == by_hand
    assert len(captured) == 2
    assert (
        set(captured[0])
        >= {"attention": {"q", "scale"}, "rms": {"x", "eps"}, "gated": {"x", "w"}}[name]
    )


@pytest.mark.parametrize("name", ["attention", "rms"])
def test_the_rewrite_is_proved_and_the_student_answers_alike(
    name: str, folder: Path, model: Model
) -> None:
    made = compile_model(bind(check(Source("r.graft", rule(name, True))), ["f.py"]), model)
    x = torch.randn(3, 6, 16)
    with torch.no_grad():
        ours, its = made.student.root(x)[0], made.teacher.root(x)[0]
    assert (ours - its).abs().max() < 1e-5 * its.abs().max()
    assert "is exact at" in made.plan.checks[0]


def test_names_are_known_without_running_the_file(folder: Path) -> None:
    Path("f.py").write_text("raise SystemExit('this must not run')\n" + FILE)
    text = rule("attention", True)
    check(Source("r.graft", text))
    with pytest.raises(GraftError) as caught:
        check(Source("r.graft", text.replace("(q, k, v, scale", "(query, k, v, scale")))
    (mistake,) = caught.value.diagnostics
    assert (mistake.code, mistake.found) == ("G105", "`query`")


def refused(name: str, rewrite: str) -> Diagnostic:
    text = f'rule r {{\n match python("f.py:{name}")\n rewrite {{ {rewrite} }}\n}}\n'
    with pytest.raises(GraftError) as caught:
        bind(check(Source("r.graft", text)), ["f.py"])
    return caught.value.diagnostics[0]


@pytest.mark.parametrize(
    ("name", "rewrite", "message"),
    [
        ("sized", "sized = relu(x)", "computes with a size"),
        ("derived", "derived = relu(x)", "makes nothing of `s`"),
        ("unread", "unread = relu(x)", "makes nothing of `y`"),
        ("returned", "returned_0 = relu(x)", "does not return what its ops make"),
        ("constant", "constant = relu(x)", "raised RuntimeError"),
        ("decides", "decides = relu(x)", "raised"),
        ("raises", "raises = relu(x)", "raised TypeError"),
        ("many", "many = relu(x)", "takes any number of arguments"),
        ("nothing", "nothing = relu(x)", "has no function `nothing`"),
    ],
)
def test_what_is_no_pattern(folder: Path, name: str, rewrite: str, message: str) -> None:
    diagnostic = refused(name, rewrite)
    assert diagnostic.code == "G435"
    assert message in diagnostic.message
    assert diagnostic.span is not None


def test_it_runs_only_where_it_was_allowed(folder: Path, model: Model) -> None:
    Path("r.graft").write_text(rule("rms", True))
    with pytest.raises(GraftError, match="G430"):
        graftc.plan("r.graft", model)
    assert len(graftc.plan("r.graft", model, allow_python=["f.py"]).steps) == 2
    assert len(graftc.explain("r.graft", model, allow_python=["f.py"])[0].selected) == 2


def test_a_pattern_may_not_leave_the_folder(folder: Path) -> None:
    Path("in").mkdir()
    Path("in/r.graft").write_text(rule("rms", True).replace("f.py", "../f.py"))
    with pytest.raises(GraftError, match="G431"):
        check("in/r.graft")
