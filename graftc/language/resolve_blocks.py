"""Block sets: parameters put in, and what no chain can satisfy refused."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from graftc.diagnostics import GraftError, Instead, Note, Span, fail, nearest
from graftc.language import syntax as s
from graftc.language.expressions import fact_options, whole
from graftc.language.rules import Blocks, Fact, Range
from graftc.language.scope import Scope, listed, suggest
from graftc.language.vocabulary import FACTS

_MOST_BLOCKS = 100_000
_WORDS = ("all", "odd", "even", "first", "last", "top", "bottom")


def blocks_of(scope: Scope, choice: s.Choice) -> Blocks:
    """The block set of `in blocks …` or `each pair of blocks …`. Raises GraftError."""
    found = _set(scope, choice.blocks, 0)
    if known_indices(found) == ():
        fail("G132", "`except` takes every block out", span=found.span, help="leave some")
    if choice.chain is None:
        return found
    if not choice.chain.value.strip():
        fail(
            "G122",
            "the name of the chain is empty",
            span=choice.chain.span,
            help='write `blocks of "transformer_blocks" …`, or leave out `of`',
        )
    return replace(found, chain=choice.chain.value, chain_span=choice.chain.span)


def _set(scope: Scope, node: s.SetValue, depth: int) -> Blocks:
    span = node.span
    match node:
        case s.BlockWord(word=word):
            return Blocks(word, span)
        case s.BlockRange():
            return _range(scope, node, depth)
        case s.Braces():
            return Blocks("ranges", span, ranges=ranges_of(scope, node))
        case s.BlockEnd(first=first):
            count, fraction = _amount(scope, node.amount, span)
            return Blocks("first" if first else "last", span, count=count, fraction=fraction)
        case s.BlockEvery():
            return _every(scope, node)
        case s.BlockMeasured():
            return _measured(scope, node)
        case s.BlockExcept():
            base = _set(scope, node.base, depth)
            excluded = base.excluded + _excluded(scope, node.excluded, depth)
            return replace(base, excluded=excluded, span=span)
        case s.Number(value=value):
            index = int(value) if value == int(value) else -1
            return Blocks("ranges", span, ranges=(_checked(Range(index, index, 1, span)),))
        case s.Percent() | s.Text():
            fail(
                "G120",
                "this is not a block set",
                span=span,
                wanted="`8..20`, `{8, 10}`, `odd`, …",
                found=span.text,
                help="write `first …`" if isinstance(node, s.Percent) else None,
            )


def _range(scope: Scope, node: s.BlockRange, depth: int) -> Blocks:
    if node.last is None and isinstance(node.first, s.Name):
        return _named(scope, node.first, node, depth)
    if node.last is None and node.step is not None:
        fail(
            "G133",
            "`step` needs a range",
            span=node.span,
            wanted="8..20 step 2",
            help=f"write `{node.first.span.text}..… step {node.step.span.text}`",
        )
    found = _bounds(scope, node.first, node.last or node.first, node.step, node.span)
    return Blocks("ranges", node.span, ranges=(found,))


def _named(scope: Scope, name: s.Name, node: s.BlockRange, depth: int) -> Blocks:
    setting = scope.setting(name.text)
    if setting is None:
        near = nearest(name.text, (*_WORDS, *scope.settings))
        fail(
            "G106",
            f"unknown block set or parameter `{name.text}`",
            span=name.span,
            wanted="`8..20`, `{8, 10}`, `odd`, `even`, `all`, `first n`, … or a `set` parameter",
            found=f"`{name.text}`",
            help=Instead(near) if near else f"add `set {name.text} = 8..20`",
        )
    if depth > 8:
        fail(
            "G116",
            f"`set {name.text}` is defined by itself",
            span=setting.span,
            help="give it a value",
        )
    try:
        found = _set(scope, setting.value, depth + 1)
    except GraftError as error:
        raise _at_use(error, name.span, setting.name) from None
    found = replace(found, span=node.span)
    if node.step is None:
        return found
    if found.kind != "ranges" or len(found.ranges) != 1 or found.ranges[0].step != 1:
        fail(
            "G133",
            "`step` needs a range",
            span=node.span,
            wanted="a parameter such as 8..20",
            found=setting.value.span.text,
            notes=[Note("it is set here", setting.span)],
        )
    step = whole(scope, node.step, "a step", 1)
    return replace(found, ranges=(replace(found.ranges[0], step=step, span=node.span),))


def _at_use(error: GraftError, span: Span, name: str) -> GraftError:
    """The same error, with a note of where the parameter was used."""
    note = Note(f"parameter `{name}` is used here", span)
    return GraftError(*(replace(d, notes=(*d.notes, note)) for d in error.diagnostics))


def _bounds(scope: Scope, first: s.Expr, last: s.Expr, step: s.Expr | None, span: Span) -> Range:
    low = whole(scope, first, "a block", 0)
    high = whole(scope, last, "a block", 0)
    if high < low:
        fail(
            "G130",
            f"the range {low}..{high} is empty",
            span=span,
            wanted="the smaller end first",
            found=f"{low}..{high}",
            help=Instead(
                f"{high}..{low}" + (f" step {step.span.text}" if step is not None else "")
            ),
        )
    by = 1 if step is None else whole(scope, step, "a step", 1)
    return _checked(Range(low, high, by, span))


def _checked(found: Range) -> Range:
    if found.first < 0 or found.last > _MOST_BLOCKS:
        fail(
            "G122",
            f"no chain has a block {found.last}",
            span=found.span,
            wanted=f"0..{_MOST_BLOCKS}",
            found=found.span.text,
        )
    return found


def ranges_of(scope: Scope, node: s.Braces) -> tuple[Range, ...]:
    """The blocks between braces. Raises GraftError where one is listed twice, or none is."""
    found: list[Range] = []
    for item in node.items:
        if isinstance(item, s.RangeItem):
            found.append(_bounds(scope, item.first, item.last, item.step, item.span))
        elif isinstance(item, s.Pair):
            fail("G120", "this is not a block", span=item.span, wanted="`8` or `20..27`")
        else:
            index = whole(scope, item, "a block", 0)
            found.append(_checked(Range(index, index, 1, item.span)))
    if not found:
        fail(
            "G132",
            "the block set is empty",
            span=node.span,
            help="write `all`, or the blocks: `{8, 10}`",
        )
    seen: dict[int, Range] = {}
    for r in found:
        for index in range(r.first, r.last + 1, r.step):
            if index in seen:
                fail(
                    "G134",
                    f"block {index} is listed twice",
                    span=r.span,
                    notes=[Note("it is also here", seen[index].span)],
                    help="list it once",
                )
            seen[index] = r
    return tuple(found)


def _excluded(scope: Scope, node: s.Braces | s.BlockRange, depth: int) -> tuple[Range, ...]:
    found = _set(scope, node, depth)
    if found.kind != "ranges" or found.excluded:
        fail(
            "G133",
            "`except` takes blocks by number",
            span=node.span,
            wanted="`{0, 27}` or `0..3`",
            found=node.span.text,
        )
    return found.ranges


def _amount(scope: Scope, node: s.Expr | None, span: Span) -> tuple[float, bool]:
    """A number of blocks, or a fraction of the chain."""
    if node is None:
        return 0.5, True
    if isinstance(node, s.Name):
        setting = scope.setting(node.text)
        if setting is not None and isinstance(setting.value, s.Percent):
            return _fraction(setting.value.value, node.span), True
    if isinstance(node, s.Percent):
        return _fraction(node.value, node.span), True
    return whole(scope, node, "the number of blocks", 1), False


def _fraction(value: float, span: Span) -> float:
    if not 0 < value <= 1:
        fail(
            "G122",
            "a share of the blocks is more than 0% and at most 100%",
            span=span,
            wanted="0% < share ≤ 100%",
            found=span.text,
        )
    return value


def _every(scope: Scope, node: s.BlockEvery) -> Blocks:
    count = whole(scope, node.count, "the number of blocks", 1)
    period = whole(scope, node.period, "the period", 1)
    start = 0 if node.start is None else whole(scope, node.start, "the first block", 0)
    if count > period:
        fail(
            "G133",
            f"{count} of every {period} is more than all",
            span=node.span,
            wanted=f"at most {period} of every {period}",
            found=f"{count}",
            help=f"write `{period} of every {count}`, or `all`",
        )
    return Blocks("every", node.span, count=count, period=period, start=start)


def _measured(scope: Scope, node: s.BlockMeasured) -> Blocks:
    count, fraction = _amount(scope, node.amount, node.span)
    measured = tuple(n for n, f in FACTS.items() if f.measured)
    head = node.measure.head if isinstance(node.measure, s.Call) else node.measure
    name = head.text if isinstance(head, s.Path) else ""
    if name not in measured:
        fail(
            "G104",
            f"unknown measure `{name}`",
            span=head.span,
            wanted=listed(measured),
            found=f"`{name}`",
            help=suggest(name, measured),
        )
    options = fact_options(scope, node.measure, name)
    if isinstance(node.measure, s.Call) and node.measure.positional:
        fail(
            "G126",
            f"`{name}` takes no site here: it is measured in each block",
            span=node.measure.span,
            help="leave the site out",
        )
    measure = Fact(name, "", options, node.measure.span)
    return Blocks(
        "measured", node.span, count=count, fraction=fraction, top=node.top, measure=measure
    )


def known_indices(blocks: Blocks) -> tuple[int, ...] | None:
    """The blocks that are meant whatever the chain's length, or None where it matters."""
    if blocks.kind != "ranges":
        return None
    chosen = {i for r in blocks.ranges for i in range(r.first, r.last + 1, r.step)}
    return tuple(
        sorted(chosen - {i for r in blocks.excluded for i in range(r.first, r.last + 1, r.step)})
    )


def check_groups(blocks: Blocks, size: int) -> int | None:
    """How many groups of neighbours there are, where that is known. Raises GraftError."""
    what = "pairs" if size == 2 else f"runs of {size}"
    every = blocks.kind == "every" and blocks.count < blocks.period
    if blocks.kind in ("odd", "even") or (every and blocks.count % size):
        _no_neighbours(blocks, what)
    known = known_indices(blocks)
    if known is None:
        return None
    if len(known) % size:
        fail(
            "G136",
            f"{len(known)} blocks do not divide into {what}",
            span=blocks.span,
            wanted=f"a multiple of {size}",
            found=f"{len(known)} blocks",
            help=f"leave out {len(known) % size}",
        )
    for at in range(0, len(known), size):
        if known[at + size - 1] - known[at] != size - 1:
            _no_neighbours(blocks, what)
    return len(known) // size


def _no_neighbours(blocks: Blocks, what: str) -> NoReturn:
    fail(
        "G136",
        f"these blocks are no neighbours, so there are no {what} of them",
        span=blocks.span,
        wanted="blocks that follow each other, such as `8..19`",
        found=blocks.span.text,
        help="write `all`, or a range without `step`",
    )
