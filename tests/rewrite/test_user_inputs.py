"""Operators of a Python file that take the site's mask and rotary positions, by the names of their forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftc
from graftc.compiler import compile_model
from graftc.diagnostics import Diagnostic, GraftError
from graftc.emit.package import load_package
from graftc.language.check import check
from graftc.program.model import Model
from graftc.rewrite.user_files import bind
from tests.rewrite.models import tiny
from tests.rewrite.test_kept_inputs import llama

OPS = """
import torch
import torch.nn.functional as F
from torch import nn


def turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attend(nn.Module):
    '''Causal attention that takes a mask and rotary positions, as Llama gives them.'''

    def __init__(self, dim, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim // heads * kv_heads, bias=False)
        self.v = nn.Linear(dim, dim // heads * kv_heads, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, mask=None, cos=None, sin=None):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for m in (self.k, self.v))
        if cos is not None:
            q, k = turned(q, cos.unsqueeze(1), sin.unsqueeze(1)), turned(k, cos.unsqueeze(1), sin.unsqueeze(1))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, float("-inf"))
        if mask is not None:
            given = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask
            scores = scores + given
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.out(y.transpose(1, 2).flatten(2))


class Positions(Attend):
    def forward(self, x, cos, sin):
        return super().forward(x, None, cos, sin)


class NoMask(Attend):
    def forward(self, x, cos=None, sin=None):
        return super().forward(x, None, cos, sin)


class Flavoured(Attend):
    def forward(self, x, flavour):
        return super().forward(x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ops.py").write_text(OPS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rule(name: str, more: str = "") -> Path:
    path = Path("r.graft")
    path.write_text(
        f'rule r {{\n match a = self_attention\n replace a with python("ops.py:{name}")\n{more}\n}}\n'
    )
    return path


KEEP = " init q = a.q, k = a.k, v = a.v, out = a.out"


def refused(file: Path, model: Model) -> Diagnostic:
    with pytest.raises(GraftError) as caught:
        graftc.plan(file, model, allow_python=["ops.py"])
    return caught.value.diagnostics[0]


@pytest.mark.parametrize("padded", [False, True])
def test_mask_and_rotary_arrive_by_name(folder: Path, padded: bool) -> None:
    """With the site's own weights the class is the same function, on padded tokens too."""
    model = llama(padded=padded)
    made = compile_model(bind(check(rule("Attend", KEEP)), ["ops.py"]), model)
    new = made.plan.edits[0].new[0]
    assert set(new.inputs) == ({"mask", "cos", "sin"} if padded else {"cos", "sin"})
    given = [model.inputs[p.name] for p in made.teacher.inputs]
    with torch.no_grad():
        wanted, found = made.teacher.root(*given)[0], made.student.root(*given)[0]
    assert (wanted - found).abs().max() < 1e-5 * wanted.abs().max()


def test_the_written_package_passes_them_too(folder: Path) -> None:
    model = llama(padded=True)
    build = graftc.compile(rule("Attend", KEEP), model, folder / "b", allow_python=["ops.py"])
    student = load_package(build.path / "student")
    with torch.no_grad():
        found = student(**model.inputs)
        wanted = model.module(**model.inputs).logits
    found = found if isinstance(found, torch.Tensor) else next(iter(found))
    assert (wanted - found).abs().max() < 1e-4 * wanted.abs().max()


def test_what_the_forward_does_not_take_is_never_dropped_in_silence(folder: Path) -> None:
    found = refused(rule("NoMask"), llama(padded=True))
    assert found.code == "G354"
    assert "attention mask" in found.message
    assert found.help == "write `drop mask` in the rule if that is meant"
    plan = graftc.plan(rule("NoMask", " drop mask"), llama(padded=True), allow_python=["ops.py"])
    assert set(plan.edits[0].new[0].inputs) == {"cos", "sin"}


@pytest.mark.parametrize(("name", "wants"), [("Positions", "`cos`"), ("Flavoured", "`flavour`")])
def test_what_the_forward_needs_and_the_site_has_not(folder: Path, name: str, wants: str) -> None:
    found = refused(rule(name), tiny(causal=True))
    assert found.code == "G558"
    assert wants in found.message
    assert found.span is not None
    assert found.help
