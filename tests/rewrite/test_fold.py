"""`fold(n)`: LayerNorm becomes RMSNorm, the mean is taken out of the stream's writers; or it says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from graftc.compiler import Compiled, compile_model, undone
from graftc.diagnostics import Diagnostic, GraftError
from graftc.emit.package import load_package, write_package
from graftc.language.check import check
from graftc.program.model import Model
from graftc.rewrite.norms import affine_tail
from graftc.rewrite.plan_text import plan_dict

ROOT = Path(__file__).parents[2]
RULE = (ROOT / "tests/corpus/fold_norm.graft").read_text(encoding="utf-8")
OF_ANY = RULE.replace(" and affine(n)", "")
WIDTH = 16


def noisy(module: nn.Module) -> nn.Module:
    """Scales, shifts and biases that are not one and zero."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "weight" in name else 0.3, 0.3)
    return module.eval()


def gpt2(tied: bool) -> Model:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=20, n_positions=12, use_cache=False,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 20, (2, 8))
    return Model(noisy(transformers.GPT2LMHeadModel(config)), {"input_ids": ids})


def vit() -> Model:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    image = torch.randn(2, 3, 8, 8)
    return Model(noisy(transformers.ViTForImageClassification(config)), {"pixel_values": image})


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """Pre-norm, or as `kind` says: post-norm, a gate after the writer, a number added, a reader that is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm, self.mlp = kind, nn.LayerNorm(WIDTH), Mlp()
        self.gate = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "post":
            return self.norm(x + self.mlp(x))
        h = self.norm(x)
        if self.kind == "read":
            return x + self.mlp(h) + h
        if self.kind == "soft":
            return x + self.mlp(torch.softmax(h, -1))
        if self.kind == "gate":
            return x + self.gate * self.mlp(h)
        if self.kind == "raw":
            return x + self.mlp(h) + torch.tanh(x)
        x = x + self.mlp(h)
        return x + 0.5 if self.kind == "number" else x


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 6, WIDTH))
        self.into = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(3))
        self.last = nn.Identity() if kind == "output" else nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def net(kind: str = "pre") -> Model:
    torch.manual_seed(0)
    return Model(noisy(Net(kind)), {"x": torch.randn(2, 6, 4)})


def compiled(model: Model, rule: str = RULE) -> Compiled:
    return compile_model(check(rule), model)


def refused(model: Model, rule: str = RULE) -> Diagnostic:
    with pytest.raises(GraftError) as caught:
        compiled(model, rule)
    return caught.value.diagnostics[0]


@pytest.mark.parametrize(("model", "norms"), [(lambda: gpt2(False), 4), (vit, 4), (net, 3)])
def test_the_corpus_rule_keeps_the_outputs(model: Any, norms: int, tmp_path: Path) -> None:
    made = compiled(model())
    assert len(made.plan.edits) == norms
    assert "is exact" in made.checks[0]
    found = load_package(_written(made, tmp_path))
    inputs = [dict(model().inputs)[p.name] for p in made.teacher.inputs]
    with torch.no_grad():
        wanted, answer = made.teacher.root(*inputs)[0], found(*inputs)
    answer = answer if isinstance(answer, Tensor) else answer[0]
    assert (wanted - answer).abs().max() < 1e-5 * wanted.abs().max()


def _written(made: Compiled, folder: Path) -> Path:
    write_package(made.student, folder / "package")
    return folder / "package"


def test_what_the_student_is() -> None:
    made = compiled(net())
    root = made.student.root
    state = dict(root.named_parameters())
    assert not any("norm.bias" in n for n in state if n.startswith("blocks"))
    for name in ("place", "into.bias", "blocks.0.mlp.down.bias"):
        assert state[name].mean(-1).abs().max() < 1e-6
    assert state["into.weight"].mean(0).abs().max() < 1e-6
    assert torch.equal(state["blocks.1.norm.weight"], torch.ones(WIDTH))
    assert "blocks.1.mlp.up.bias" in state  # the shift had nowhere to go
    assert affine_tail(made.student.module("last")) == (
        "weight",
        "bias",
    )  # not in a block: it stays
    origins = {o.parameter: o.text for s in made.plan.steps for o in s.origins}
    assert origins["place"] == "itself, with the mean taken out"
    assert origins["blocks.2.mlp.up.weight"] == "itself, with the scale and shift of blocks.2.norm"
    assert sum(o.parameter == "place" for s in made.plan.steps for o in s.origins) == 1
    assert plan_dict(made.plan)["edits"]


def test_it_is_undone_bit_for_bit() -> None:
    made = compiled(net())
    back, original = undone(made).root.state_dict(), made.teacher.root.state_dict()
    assert list(back) == list(original)
    assert all(torch.equal(back[n], original[n]) for n in original)


def test_it_ships() -> None:
    rules = check("use std.fold\n")
    assert len(compile_model(rules, net()).plan.edits) == 3


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("post", "post-norm: `add` in blocks."),
        ("gate", "a gate stands after the writer: `mul` in blocks."),
        ("raw", "`tanh` in blocks."),
        ("read", "`add` in blocks.0 adds to what the norm makes"),
        ("soft", "`softmax` in blocks.0 reads the norm and is no linear"),
        ("number", "adds a number to the stream"),
        ("output", "the stream is an output of the model"),
    ],
)
def test_what_cannot_be_folded(kind: str, why: str) -> None:
    found = refused(net(kind))
    assert found.code == "G436"
    assert why in found.message
    assert found.site is not None
    assert found.site.startswith("blocks.")


def test_a_tied_head_is_refused() -> None:
    found = refused(gpt2(tied=True))
    assert found.code == "G436"
    assert "`transformer.wte.weight` is tied: `linear` in lm_head reads it too" in found.message


def test_a_dit_is_refused(dit_model: Model) -> None:
    found = refused(dit_model, OF_ANY)
    assert found.code == "G436"
    assert "a gate stands after the writer: `mul` in transformer_blocks." in found.message


def test_another_rule_may_not_take_a_writer() -> None:
    other = "rule thin {\n match m = mlp in blocks {1}\n replace m with mlp(ratio = 1)\n}\n"
    found = refused(net(), RULE + other)
    assert found.code == "G340"
    assert "blocks.1.mlp" in found.message


@pytest.mark.parametrize(
    "edit",
    [
        "replace n with layer_norm(eps = eps(n))",
        "insert rms_norm(dim = 16, eps = 0.1, affine = true) after n",
    ],
)
def test_it_is_for_a_norm_that_becomes_an_rms_norm(edit: str) -> None:
    rule = f"rule r {{\n match n = norm in blocks all\n {edit}\n init fold(n)\n}}\n"
    assert refused(net(), rule).code == "G436"
