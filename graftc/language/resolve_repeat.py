"""`repeat(measure)`: what must fall at each step of a rule that runs until nothing changes."""

from __future__ import annotations

from graftc.diagnostics import fail
from graftc.language import syntax as s
from graftc.language.dataflow_ops import ALIASES, OPS
from graftc.language.rules import Distill, Edit, Measure, OneOf
from graftc.language.scope import listed, suggest

MEASURES = ("ops", "params", "flops")


def measure_of(item: s.RuleItem) -> Measure | None:
    """The measure of a rule's head, None where it has no `repeat`. Raises GraftError."""
    head = next((h for h in item.head if h.word == "repeat"), None)
    if head is None or head.measure is None:
        return None
    node = head.measure
    if isinstance(node, s.Path) and node.text in MEASURES:
        return Measure(node.text, head.span)  # type: ignore[arg-type]
    if isinstance(node, s.Call) and isinstance(node.head, s.Path) and node.head.text == "count":
        name = node.positional[0] if len(node.positional) == 1 and not node.named else None
        if isinstance(name, s.Path):
            op = ALIASES.get(name.text, name.text)
            if op not in OPS:
                fail("G371", f"unknown op `{op}`", span=name.span, help=suggest(op, tuple(OPS)))
            return Measure("count", head.span, op)
    fail(
        "G380",
        "this is no measure that can fall",
        span=node.span,
        wanted=listed(MEASURES) + " or `count(OP)`",
        found=node.span.text,
        help=suggest(node.span.text, MEASURES)
        or "write `repeat(ops)`: the number of ops in the model",
    )


def check_repeated_sites(
    head: s.HeadWord, distill: Distill | None, contract: str, edit: Edit, inserted: bool
) -> None:
    """An edit of sites that repeats has no targets, and its outputs change. Raises GraftError."""
    if distill is not None:
        fail(
            "G440",
            "a rule that repeats is not distilled",
            span=distill.span,
            wanted="an edit of the teacher's own sites: later rounds edit what earlier ones made",
            help="leave out `distill`: stage 2 trains the student, or leave out `repeat`",
        )
    if contract == "exact":
        fail(
            "G441",
            "a rule that repeats on sites is not `exact`",
            span=head.span,
            wanted="`rewrite { … }`, whose rounds are each run before and after",
            help="leave out `exact`",
        )
    if isinstance(edit, OneOf):
        fail(
            "G446",
            "a rule that repeats has no candidates",
            span=edit.span,
            wanted="one operator: what each round makes is what the next one matches",
            help="leave out `repeat`, or name one operator",
        )
    if inserted:
        fail(
            "G446",
            "a rule that repeats does not say what stage 2 trains",
            span=head.span,
            wanted="`finetune { train = … }`",
            found="`train inserted`",
            help="leave out `train inserted`",
        )
