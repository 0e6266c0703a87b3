"""`graftc fmt`: idempotent, keeps comments, never changes what a file means."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.diagnostics import GraftError, Source
from graftc.language.formatter import format_text, is_formatted, laid_out, meaning
from graftc.language.parser import grammar
from graftc.language.resources import rules_folder
from graftc.language.tokens import scan


@pytest.mark.parametrize("path", sorted(rules_folder().rglob("*.graft")), ids=lambda p: p.stem)
def test_what_ships_is_formatted(path: Path) -> None:
    assert is_formatted(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", range(len(fuzz.SEEDS)))
def test_idempotent_and_of_the_same_meaning(number: int) -> None:
    text = fuzz.SEEDS[number]
    once = laid_out(Source("a", text))
    assert meaning(Source("a", once)) == meaning(Source("a", text))
    assert laid_out(Source("a", once)) == once


def test_mutated_files_keep_their_meaning() -> None:
    rng = random.Random(8)
    assert sum(fuzz.layout(fuzz.mutated(rng)) for _ in range(1500)) > 100


def test_every_construct_beside_any_other_keeps_its_meaning() -> None:
    """Texts grown from the grammar: each parses, whatever it would mean."""
    rng = random.Random(9)
    texts = [fuzz.grown(rng) for _ in range(400)]
    parsed = sum(fuzz.layout(text) for text in texts)
    assert parsed > 200
    rules = {rule.origin.name for rule in grammar().lark.rules}
    assert len(rules) > 60


@given(st.sampled_from(fuzz.SEEDS), st.randoms(use_true_random=False))
def test_white_space_does_not_matter(text: str, rng: random.Random) -> None:
    """Blanks between tokens, and empty lines, are the formatter's own."""
    tokens, _ = scan(Source("a", text), grammar().terminals)
    scrambled, at = "", 0
    for token in tokens:
        glued = token.type in ("LPAR", "LSQB", "NL")  # `f (x)` keeps its blank: it may be two words
        gap = text[at : token.start]
        scrambled += gap if glued or not gap else " " * rng.randint(1, 4)
        scrambled += token.value * (rng.randint(1, 3) if token.type == "NL" else 1)
        at = token.end
    lines = [line for line in format_text(scrambled).splitlines() if line]
    assert lines == [line for line in format_text(text).splitlines() if line]


def test_comments_stay_in_their_order() -> None:
    text = "# one\nset x=4   # two\n\n\n# three\nrule r{ # four\nmatch b=block in blocks first x #five\nskip b\n#six\n}#seven"
    assert format_text(text) == (
        "# one\n"
        "set x = 4  # two\n"
        "\n"
        "# three\n"
        "rule r {  # four\n"
        "    match   b = block in blocks first x  #five\n"
        "    skip    b\n"
        "    #six\n"
        "}  #seven\n"
    )


def test_a_clause_of_several_lines_is_aligned() -> None:
    text = "rule r {\nmatch a = self_attention\nreplace a with attention()\ninit q = a.q, k = a.k\nv = a.v\ndistill l2\n}\n"
    assert "    init    q = a.q, k = a.k\n            v = a.v\n    distill l2\n" in format_text(
        text
    )


def test_what_does_not_parse_is_refused() -> None:
    with pytest.raises(GraftError, match="G010"):
        format_text("rule {")
