"""The examples of docs/language.md on a small model of 28 blocks: each makes a plan, or says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.diagnostics import GraftError, Source
from graftc.language.check import check
from graftc.measures import Measuring, measure
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.rewrite.measured import families
from graftc.rewrite.plan import make_plan
from graftc.rewrite.user_files import bind
from tests.measures.test_measure import AsItIs

PAGE = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```graft\n(.*?)```", PAGE, re.DOTALL)
FILES = dict(re.findall(r"```(?:python|graft)\n# (\S+\.(?:py|graft))\n(.*?)```", PAGE, re.DOTALL))
"""Files that an example names, shown above it."""
REFUSED = {"rule sdpa": "G332", "rule rms exact": "G332", "fold(n)": "G436", "rule disc": "G310"}
"""An example → the refusal: this model writes no attention and no norm out, returns its stream, and has no joint attention."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            part(source).unflatten(-1, (4, 4)).transpose(1, 2)
            for part, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.ff = Attention(), FeedForward()
        self.norm3, self.cross = (nn.LayerNorm(16), Attention()) if cross else (None, None)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h)
        if self.cross is not None and self.norm3 is not None:
            x = x + self.cross(self.norm3(x), text)
        return x + self.ff(self.norm2(x))


class Net(nn.Module):
    """28 blocks, cross-attention only in the last four."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(i >= 24) for i in range(28))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x, text)
        return x


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    with torch.device("meta"):
        inputs = {"x": torch.zeros(2, 64, 16), "text": torch.zeros(2, 5, 16)}
        return analyse(capture(Model(Net(), inputs)))


@pytest.fixture(scope="module")
def measured() -> Analysis:
    """The same model, with weights, measured on two samples."""
    torch.manual_seed(0)
    samples = [{"x": torch.randn(64, 16), "text": torch.randn(5, 16)} for _ in range(2)]
    inputs = {n: torch.stack([s[n] for s in samples]) for n in samples[0]}
    analysis = analyse(capture(Model(Net(), inputs)))
    return measure(analysis, Measuring(samples, AsItIs(), samples=2))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_makes_a_plan(
    number: int, analysis: Analysis, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = EXAMPLES[number]
    allowed: list[Path] = []
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
        if f'python("{name}:' in text:
            allowed.append(tmp_path / name)
    rules = bind(check(Source(str(tmp_path / f"example{number}.graft"), text)), allowed)
    if families(rules):
        with pytest.raises(GraftError, match="G135"):
            make_plan(rules, analysis)
        analysis = request.getfixturevalue("measured")
    wanted = next((code for word, code in REFUSED.items() if word in text), None)
    if wanted is not None:
        with pytest.raises(GraftError, match=wanted):
            make_plan(rules, analysis)
        return
    plan = make_plan(rules, analysis)
    assert plan.steps or any("matches: params" in line for line in plan.checks)
