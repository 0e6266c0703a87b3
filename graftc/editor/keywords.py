"""The keywords, in groups for colouring, with a line on each for hover."""

from __future__ import annotations

from collections.abc import Mapping

from graftc.language.parser import grammar
from graftc.language.syntax_errors import CLAUSE_WORDS, ITEM_WORDS

WORD_OPERATORS = ("and", "or", "not", "is", "maybe")


def keywords() -> frozenset[str]:
    """Every keyword of grammar/graft.lark.

    >>> "match" in keywords(), "hyena_x" in keywords()
    (True, False)
    """
    return frozenset(grammar().terminals.keywords)


def group(word: str) -> str:
    """`item`, `clause`, `operator` or `modifier`: what kind of keyword a word is.

    >>> group("rule"), group("match"), group("and"), group("step")
    ('item', 'clause', 'operator', 'modifier')
    """
    if word in ITEM_WORDS:
        return "item"
    if word in CLAUSE_WORDS:
        return "clause"
    return "operator" if word in WORD_OPERATORS else "modifier"


DOCS: Mapping[str, str] = {
    "use": "Brings in rules and operators: `use std.mixers`, `use a, b from std.mixers`, `use \"parts/mine.graft\"`.",
    "from": "`use a, b from FILE`: these names alone. `3 of every 4 from 1`: where counting begins.",
    "set": "A parameter: a number, a percentage, a word, a text or a block set. `--set name=value` overrides it.",
    "rule": "`rule NAME [exact | approx | learned] [after R, …] [\"what it does\"] { … }`: one edit.",
    "exact": "The edit leaves the model's outputs as they are; checked by running.",
    "approx": "The edit changes outputs, and is not distilled.",
    "learned": "The edit is distilled; the default with `distill`.",
    "repeat": "`repeat(measure)`: applied until nothing matches; the measure must fall each time.",
    "after": "`after R`: this rule comes after another. `insert … after b`: where it goes. In a test: the graph wanted.",
    "match": "What is edited: a role, a path, a class, neighbouring blocks, or a dataflow pattern in braces.",
    "python": "`match python(\"file.py:function\")`: a pattern captured from a function. `python(\"file.py:Class\", …)`: an operator. Needs `--allow-python file.py`.",
    "each": "`each pair of blocks …`, `each run of 3 blocks …`: neighbours in the data flow.",
    "pair": "`each pair of blocks`: 0 and 1, 2 and 3, …",
    "run": "`each run of n blocks`: n neighbours at a time.",
    "of": "`blocks of \"chain\"`: which chain. `3 of every 4`: which of them. `test NAME of RULE`.",
    "blocks": "Blocks are numbered from 0 within a chain.",
    "module": "`m = module \"blocks.*.ff\"`: by path; `*` stays between two dots, `**` crosses them.",
    "class": "`m = class \"package.FeedForward\"`: by the original module's class.",
    "then": "`a, b = self_attention then mlp`: sites that follow each other.",
    "in": "`in blocks …`: which blocks. `linear in mlp`: inside a site of another role.",
    "where": "Guards over the bindings; what they filter out is listed by `plan`.",
    "replace": "`replace a with op(…)`, `replace with parallel(a, b, merge = …)`, `replace a with one of {…}`.",
    "with": "`replace a with op(…)`.",
    "one": "`one of {op(…), op(…), keep}`: candidates; all are distilled.",
    "rewrite": "What a dataflow pattern becomes.",
    "remove": "The branch contributes zero.",
    "skip": "The block becomes the identity on the residual stream.",
    "insert": "`insert copy(b) after b`: a new block.",
    "init": "First weights: a source for each slot, or one for the whole operator.",
    "distill": "Stage 1 of this rule's sites: `distill l1, samples = 8k`.",
    "expect": "How many matches there must be; `all`: one in each selected block or group.",
    "all": "Every block; with `expect`, one match in each.",
    "train": "`train inserted`: stage 2 trains what such rules inserted, and only that.",
    "drop": "What an edit may lose: `drop mask`, `drop rotary`.",
    "finetune": "Stage 2: the whole student, on the task's loss.",
    "except": "`all except {0, 27}`: takes blocks out.",
    "odd": "Blocks 1, 3, 5, …",
    "even": "Blocks 0, 2, 4, …",
    "first": "`first 14`, `first half`, `first 10%`: from the chain's start.",
    "last": "`last 14`, `last half`, `last 10%`: from the chain's end.",
    "half": "Half of the chain, rounded half up.",
    "step": "`8..20 step 2`: every second block.",
    "every": "`3 of every 4 from 1`: i ≥ 1 and (i − 1) mod 4 < 3.",
    "top": "`top 50% by locality(band = 32)`: highest first, measured on data.",
    "bottom": "`bottom 6 by influence`: lowest first, measured on data.",
    "by": "The measure that ranks blocks.",
    "or": "Either holds.",
    "and": "Both hold.",
    "not": "The opposite.",
    "is": "`scale is number`: what a bound value is.",
    "maybe": "`maybe dropout(p)`: an op that may be there or not.",
    "return": "The operator's result; its last line.",
    "operator": "A replacement operator written in the language.",
    "test": "`test NAME of RULE { before {…} inputs … after {…} expect N }`.",
    "before": "The graph that a test tries its rule on.",
    "inputs": "The inputs of a test's graph, with their shapes.",
}  # fmt: skip
