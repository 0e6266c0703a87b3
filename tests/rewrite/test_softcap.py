"""The cap of the scores, as Gemma 2 has it: kept by operators with scores, refused by name where it would be lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.compiler import compile_model
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.operators.attention import Attention, CrossAttention, LatentAttention
from graftc.operators.joint import JointAttention
from graftc.operators.linear_attention import LinearWindowAttention
from graftc.operators.local_2d import LocalAttention2d
from graftc.operators.sliding_window import SlidingWindow
from graftc.program.analysis import analyse
from graftc.program.capture import capture
from graftc.program.model import Model

CAP = 0.5  # so low that nothing is linear


class Capped(nn.Module):
    """Attention with its scores in the forms that models write; `form` says which."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(
            torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9
        )
        if self.form == "gemma":
            scores = torch.tanh(scores * 0.5 / CAP) * CAP + mask
        elif self.form == "one division":  # the factor and the cap in one number
            scores = (CAP * torch.tanh(scores / (2 * CAP))).masked_fill(mask < -1, -1e9)
        elif self.form == "mask inside":
            scores = CAP * torch.tanh((scores * 0.5 + mask) / CAP)
        y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.attn = Capped(form)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


def model(form: str) -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(Block(form), Block(form)).eval(), {"input": torch.randn(2, 9, 8)})


def rule(edit: str, more: str = "") -> str:
    return f"rule r {{\n match a = self_attention\n replace a with {edit}\n {more}\n distill l2\n}}"


@pytest.mark.parametrize("form", ["gemma", "one division"])
@pytest.mark.parametrize("edit", ["attention()", "sliding_window(window = 8)"])
def test_a_cap_is_read_and_kept(form: str, edit: str) -> None:
    given = model(form)
    site = next(analyse(capture(given)).of_role("attention"))
    assert (site.facts["softcap"], site.facts.get("scale")) == (CAP, None)
    made = compile_model(check(rule(edit)), given)
    x = given.inputs["input"]
    torch.testing.assert_close(made.student.root(x)[0], given.module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "edit", "found"),
    [
        ("gemma", "linear_attention()", "softcap = 0.5"),
        ("mask inside", "attention()", "another form"),
    ],
)
def test_a_cap_that_would_be_lost_is_said(form: str, edit: str, found: str) -> None:
    with pytest.raises(GraftError) as caught:
        compile_model(check(rule(edit)), model(form))
    first = caught.value.diagnostics[0]
    assert (first.code, found in str(first.found)) == ("G354", True)
    assert "cap of the scores at 0.attn" in first.message
    dropped = compile_model(check(rule(edit, "drop softcap")), model(form))
    assert dropped.plan.edits[0].new[0].arguments.get("softcap") is None


def test_gemma_2_is_grafted_onto_itself() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, vocab_size=50, use_cache=False, attn_logit_softcapping=0.3, sliding_window=64,
        query_pre_attn_scalar=8, attn_implementation="eager",
    )  # fmt: skip
    given = Model(Gemma2ForCausalLM(config).eval(), {"input_ids": torch.randint(0, 50, (2, 12))})
    made = compile_model(check(rule("attention()")), given)
    assert {e.new[0].arguments["softcap"] for e in made.plan.edits} == {0.3}
    x = given.inputs["input_ids"]
    with torch.no_grad():
        found, wanted = made.student.root(x)[0], given.module(x).logits
    torch.testing.assert_close(found, wanted)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Any) -> Tensor:
    """By heads of 4: tanh written out."""
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / 2 / CAP
    scores = CAP * (1 - 2 / ((2 * scores).exp() + 1))
    weight = scores.exp() * torch.as_tensor(seen).to(scores.dtype)
    return ((weight / weight.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


AWAY = torch.arange(9).unsqueeze(1) - torch.arange(9)
ROW, COLUMN = torch.arange(9) // 3, torch.arange(9) % 3
DISC = (ROW.unsqueeze(1) - ROW) ** 2 + (COLUMN.unsqueeze(1) - COLUMN) ** 2 < 4
SELF = {
    "attention": (lambda: Attention(8, 4, 2, 4, softcap=CAP), AWAY == AWAY),
    "causal attention": (lambda: Attention(8, 4, 2, 4, causal=True, softcap=CAP), AWAY >= 0),
    "blocks": (lambda: SlidingWindow(8, 4, 2, 2, 4, softcap=CAP), AWAY.abs() <= 2),
    "dense": (lambda: SlidingWindow(8, 4, 2, 2, 4, form="dense", softcap=CAP), AWAY.abs() <= 2),
    "disc": (lambda: LocalAttention2d(8, 4, 2, 3, 3, 2, 4, softcap=CAP), DISC),
    "window": (lambda: LinearWindowAttention(8, 4, 9, 2, 4, softcap=CAP), AWAY == AWAY),
}  # fmt: skip


@pytest.mark.parametrize("name", SELF)
def test_capped_scores_of_every_operator_that_has_scores(name: str) -> None:
    make, seen = SELF[name]
    torch.manual_seed(0)
    op, x = make().double(), 3 * torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v = op.in_proj(x).split([16, 8, 8], -1)
    torch.testing.assert_close(op(x), op.out_proj(dense(q, k, v, seen)), rtol=1e-10, atol=1e-10)


def test_capped_scores_of_the_others() -> None:
    torch.manual_seed(0)
    x, context = (3 * torch.randn(2, n, 8, dtype=torch.float64) for n in (9, 5))
    op = CrossAttention(8, 8, 4, 2, 4, softcap=CAP).double()
    k, v = op.kv_proj(context).chunk(2, -1)
    torch.testing.assert_close(op(x, context), op.out_proj(dense(op.q_proj(x), k, v, True)))
    op = LatentAttention(8, 4, 3, 4, softcap=CAP).double()
    k, v = op.kv_up(op.kv_down(x)).chunk(2, -1)
    torch.testing.assert_close(op(x), op.out_proj(dense(op.q_proj(x), k, v, True)))
    op = JointAttention(8, 8, 4, head_dim=4, softcap=CAP).double()
    both = torch.cat((op.in_proj(x), op.in_proj_2(context)), 1).chunk(3, -1)
    y = dense(*both, True)
    torch.testing.assert_close(op(x, context), (op.out_proj(y[:, :9]), op.out_proj_2(y[:, 9:])))
    with pytest.raises(ValueError, match="softcap is 0"):
        Attention(8, 4, softcap=0)
