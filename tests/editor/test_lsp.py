"""`graftc lsp` as an editor meets it: a real client, a process of its own, standard input and output."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import Editor

from graftc.language.formatter import format_text
from graftc.language.vocabulary import ROLES
from graftc.operators.specs import SPECS

RULE = """set width = 4

rule local "sees the tokens near by" {
    match   a = self_attention in blocks odd
    where   tokens(a) >= 16
    replace a with sliding_window(window = width)
    distill l1, samples = 8k
}
"""


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    found = Editor(tmp_path_factory.mktemp("work"))
    yield found
    assert found.stop() == 0


def test_a_right_file_has_no_diagnostics(editor: Editor) -> None:
    assert editor.diagnostics(editor.open(RULE, "right.graft")) == []


def test_mistakes_stand_where_they_are_and_go_when_mended(editor: Editor) -> None:
    uri = editor.open(RULE.replace("self_attention", "self_atention"), "mended.graft")
    (found,) = editor.diagnostics(uri)
    assert found.code == "G101"
    assert "write `self_attention`" in found.message
    assert (found.range.start.line, found.range.start.character) == (3, 16)
    assert found.range.end.character - found.range.start.character == len("self_atention")
    editor.open(RULE, "mended.graft")
    assert editor.diagnostics(uri) == []


def test_a_mistake_offers_its_edit(editor: Editor) -> None:
    wrong = RULE.replace("self_attention", "self_atention")
    (fix,) = editor.fixes(wrong.replace("self_at", "self_|at"), "fixed.graft")
    assert fix.title == "write `self_attention`"
    assert fix.kind == "quickfix"
    assert fix.edit is not None
    assert fix.edit.changes is not None
    ((change,),) = fix.edit.changes.values()
    line = wrong.splitlines()[change.range.start.line]
    start, end = change.range.start.character, change.range.end.character
    after = line[:start] + change.new_text + line[end:]
    assert after == RULE.splitlines()[change.range.start.line]
    assert editor.fixes(wrong.replace("sliding", "|sliding"), "fixed.graft") == []


def test_every_independent_mistake_is_told(editor: Editor) -> None:
    text = RULE.replace("tokens(a)", "tokns(a)").replace("l1", "l7").replace("odd", "step2")
    found = editor.diagnostics(editor.open(text, "many.graft"))
    assert [(d.range.start.line, d.code) for d in found] == [(3, "G106"), (4, "G104"), (6, "G121")]


def test_columns_are_utf_16(editor: Editor) -> None:
    text = 'rule r "😀 𝔾" { match a = blok in blocks odd\n remove a }\n'
    (found,) = editor.diagnostics(editor.open(text, "wide.graft"))
    before = text[: text.index("blok")]
    assert found.range.start.character == len(before.encode("utf-16-le")) // 2


def test_a_byte_order_mark_shifts_nothing(editor: Editor) -> None:
    text = "\ufeffrule r { match a = blok in blocks odd\n remove a }\n"
    (found,) = editor.diagnostics(editor.open(text, "bom.graft"))
    assert found.range.start.character == text.index("blok")


def test_a_mistake_in_a_used_file_stands_at_its_use(editor: Editor) -> None:
    (editor.folder / "part.graft").write_text(RULE.replace("self_attention", "self_atention"))
    (found,) = editor.diagnostics(editor.open('use "part.graft"\n', "user.graft"))
    assert found.range.start.line == 0
    assert found.related_information
    place = found.related_information[0].location
    assert place.uri.endswith("part.graft")
    assert place.range.start.line == 3


def test_closing_takes_the_diagnostics_back(editor: Editor) -> None:
    uri = editor.open("rule {", "closed.graft")
    assert editor.diagnostics(uri)
    editor.close(uri)
    editor.diagnostics(editor.open(RULE, "after.graft"))  # the server answers in order
    assert not editor.published[uri][-1].diagnostics


@pytest.mark.parametrize(
    ("marked", "words"),
    [
        (RULE.replace("sliding_", "slid|ing_"), ("sliding_window(", "window", "`attention`|self_attention", "default `init`")),
        (RULE.replace("self_att", "self|_att"), ("role", "one source")),
        (RULE.replace("tokens(a)", "tok|ens(a)"), ("int", "tokens that the site sees")),
        (RULE.replace("(window =", "(win|dow ="), ("window", "int", "of `sliding_window`")),
        (RULE.replace("= width", "= wid|th"), ("set width = 4",)),
        (RULE.replace("replace a", "replace a|"), ("`a`: self_attention",)),
        (RULE.replace("distill", "dist|ill"), ("Stage 1",)),
        (RULE.replace("samples", "sam|ples"), ("samples that are drawn",)),
        (RULE.replace("l1", "l|1"), ("absolute difference",)),
        (RULE.replace("rule local", "rule lo|cal"), ("sees the tokens near by",)),
    ],
)  # fmt: skip
def test_hover(editor: Editor, marked: str, words: tuple[str, ...]) -> None:
    said = editor.hover(marked, "hover.graft")
    for word in words:
        assert any(w in said for w in word.split("|")), said


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_operator_says_its_arguments_and_default_init(editor: Editor, name: str) -> None:
    marked = f"rule r {{\n    match a = self_attention\n    replace a with {name}|()\n}}\n"
    said, spec = editor.hover(marked, "operators.graft"), SPECS[name]
    assert spec.summary in said
    for arg in spec.args:
        assert f"`{arg.name}" in said
    for role, sources in spec.inits.items():
        if sources:
            assert f"default `init` for `{role}`" in said


def test_hover_says_nothing_of_nothing(editor: Editor) -> None:
    assert editor.hover(RULE.replace(" >= ", " >|= "), "hover.graft") == ""


@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        ("    match a = |", {*ROLES, "module", "class", "each"}, {"where", "hyena_x"}),
        ("    match a = mlp |", {"in"}, {"mlp", "rule"}),
        ("    match a = mlp in |", {"blocks", "block"}, {"odd"}),
        ("    match a = mlp in blocks |", {"odd", "even", "first", "all", "top", "width"}, {"mlp", "where"}),
        ("    match a = mlp in blocks top 4 by |", {"locality", "influence"}, {"tokens"}),
        ("    match a = mlp\n    |", {"where", "replace", "distill"}, {"rule"}),
        ("    match a = mlp\n    where |", {"tokens", "heads", "not", "min"}, {"hyena_x"}),
        ("    match a = mlp\n    where tokens(|", {"a"}, {"hyena_x", "where"}),
        ("    match a = mlp\n    replace |", {"a", "with"}, {"hyena_x"}),
        ("    match a = mlp\n    replace a with |", {"hyena_x", "mlp", "parallel", "one"}, {"tokens"}),
        ("    match a = mlp\n    replace a with hyena_x(|", {"kernel", "causal"}, {"window"}),
        ("    match a = mlp\n    replace a with hyena_x(kernel = 4, |", {"causal"}, {"kernel"}),
        ("    match a = mlp\n    replace a with hyena_x(causal = |", {"true", "false"}, {"kernel"}),
        ("    match a, b = each pair of blocks all\n    replace with parallel(a, |", {"b", "merge"}, {"where"}),
        ("    match a, b = each pair of blocks all\n    replace with parallel(a, b, merge = |", {"sum", "linear", "lerp"}, {"kernel"}),
        ("    match a = self_attention\n    replace a with hyena_x()\n    init |", {"in_proj", "short_filter"}, {"up"}),
        ("    match a = self_attention\n    replace a with hyena_x()\n    init in_proj = |", {"a", "concat", "zero"}, {"where"}),
        ("    match a = self_attention\n    replace a with hyena_x()\n    init in_proj = a.|", {"q", "k", "v", "out"}, {"up"}),
        ("    match m = mlp\n    replace m with mlp(ratio = 2)\n    init keep_top(m, by = |", {"magnitude"}, {"lerp"}),
        ("    match a = mlp\n    distill |", {"l1", "l2", "huber"}, {"warmup"}),
        ("    match a = mlp\n    distill l1, |", {"samples", "lr"}, {"warmup"}),
        ("    match a = mlp\n    remove |", {"a"}, {"hyena_x"}),
        ("    match a = mlp\n    drop |", {"mask", "rotary"}, {"a"}),
        ("    match a = mlp  # |", set(), {"where", "in"}),
    ],
)  # fmt: skip
def test_completion_in_a_rule(
    editor: Editor, line: str, wanted: set[str], unwanted: set[str]
) -> None:
    found = set(editor.complete(f"set width = 4\nrule r {{\n{line}", "complete.graft"))
    assert wanted <= found, f"missing {sorted(wanted - found)} of {sorted(found)}"
    assert not unwanted & found


@pytest.mark.parametrize(
    ("marked", "wanted"),
    [
        ("|", {"use", "set", "rule", "operator", "test", "finetune"}),
        ("use |", {"std.mixers"}),
        ("use std.|", {"mixers"}),
        ("finetune { |", {"steps", "warmup", "ema"}),
        ("rule a { match m = mlp\n remove m }\nrule b after |", {"a"}),
        ("rule a { match m = mlp\n remove m }\ntest t of |", {"a"}),
        ("rule b |", {"exact", "approx", "learned", "after"}),
    ],
)
def test_completion_outside_a_rule(editor: Editor, marked: str, wanted: set[str]) -> None:
    assert wanted <= set(editor.complete(marked, "outside.graft"))


def test_go_to_what_the_file_defines(editor: Editor) -> None:
    found = editor.definition(RULE.replace("= width)", "= wi|dth)"), "define.graft")
    assert found is not None
    assert found.uri.endswith("define.graft")
    assert (found.range.start.line, found.range.start.character) == (0, 4)
    found = editor.definition(RULE.replace("replace a", "replace |a"), "define.graft")
    assert found is not None
    assert (found.range.start.line, found.range.start.character) == (3, 12)


def test_go_to_an_operator_and_to_a_used_file(editor: Editor) -> None:
    found = editor.definition(RULE.replace("sliding_", "slid|ing_"), "define.graft")
    assert found is not None
    assert found.uri.endswith("graftc/operators/sliding_window.py")
    found = editor.definition("use std.mi|xers\n", "define.graft")
    assert found is not None
    assert found.uri.endswith("rules/std/mixers.graft")
    found = editor.definition("use local|_window from std.mixers\n", "define.graft")
    assert found is not None
    assert found.uri.endswith("rules/std/mixers.graft")
    assert found.range.start.line > 0
    assert editor.definition(RULE.replace("odd", "o|dd"), "define.graft") is None


def test_format(editor: Editor) -> None:
    crooked = "set x=8 .. 20   # which\nrule r{match a=mlp in blocks x\nremove a}\n"
    (edit,) = editor.format(crooked, "format.graft")
    assert edit.new_text == format_text(crooked)
    assert editor.format(edit.new_text, "format.graft") == []


def test_a_broken_file_is_not_formatted_and_says_so(editor: Editor) -> None:
    assert editor.format("rule {", "broken.graft") == []
    assert "unexpected `{`" in editor.said("not formatted")


def test_outline(editor: Editor) -> None:
    assert editor.outline(RULE, "outline.graft") == ["width", "local"]


def test_a_model_gives_chains_and_paths(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODEL)
    editor = Editor(tmp_path, "-m", f"{tmp_path / 'm.py'}:model")
    try:
        assert "layers (3 blocks)" in editor.said("m.py")
        found = editor.complete('rule r {\n  match b = block in blocks of "|')
        assert found == ["layers"]
        paths = editor.complete('rule r {\n  match b = module "|')
        assert "layers.0" in paths
    finally:
        editor.stop()


def test_nothing_of_torch_is_imported() -> None:
    script = "import sys, graftc.editor.server, graftc.editor.pygments_lexer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_without_pygls_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['pygls'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'pygls' else find(n, *a)\n"
        "from graftc.cli import main; main(['lsp'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3
    assert "pip install 'graftc[lsp]'" in done.stderr


MODEL = """
import torch
from torch import nn
import graftc

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(a)
        return x + self.down(torch.relu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def model():
    return graftc.Model(Net(), {"x": torch.zeros(2, 4, 16)})
"""
