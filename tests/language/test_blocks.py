"""Block sets against a reference that enumerates them one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.diagnostics import GraftError
from graftc.language.blocks import select
from graftc.language.check import check
from graftc.language.rules import SiteMatch

LENGTH = st.integers(1, 60)


def chosen(text: str, length: int) -> tuple[int, ...]:
    (rule,) = check(f"rule r {{\n match b = block in blocks {text}\n skip b\n}}").rules
    (match,) = rule.matches
    assert isinstance(match, SiteMatch)
    assert match.blocks is not None
    return select(match.blocks, length, "blocks")


def reference(length: int, holds: Callable[[int], bool]) -> tuple[int, ...]:
    return tuple(i for i in range(length) if holds(i))


def agrees(text: str, length: int, wanted: tuple[int, ...]) -> None:
    if wanted:
        assert chosen(text, length) == wanted
    else:
        with pytest.raises(GraftError) as caught:
            chosen(text, length)
        assert caught.value.diagnostics[0].code in ("G132", "G137")


@given(LENGTH, st.sampled_from(["all", "odd", "even"]))
def test_words(length: int, word: str) -> None:
    parity = {"all": (0, 1), "odd": (1,), "even": (0,)}[word]
    agrees(word, length, reference(length, lambda i: i % 2 in parity))


@given(LENGTH, st.integers(1, 9), st.integers(1, 9), st.integers(0, 12))
def test_every(length: int, count: int, period: int, start: int) -> None:
    if count > period:
        count, period = period, count
    wanted = reference(length, lambda i: i >= start and (i - start) % period < count)
    agrees(f"{count} of every {period} from {start}", length, wanted)


@given(LENGTH, st.data())
def test_ranges_steps_and_exceptions(length: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first, length - 1))
    step = data.draw(st.integers(1, 5))
    out = data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=6))
    base = reference(length, lambda i: first <= i <= last and (i - first) % step == 0)
    agrees(f"{first}..{last} step {step}", length, base)
    wanted = tuple(i for i in base if i not in out)
    if set(base) & out:
        listed = ", ".join(map(str, sorted(out)))
        agrees(f"{first}..{last} step {step} except {{{listed}}}", length, wanted)


@given(LENGTH, st.integers(1, 60), st.sampled_from(["first", "last"]))
def test_first_and_last(length: int, count: int, which: str) -> None:
    if count > length:
        with pytest.raises(GraftError) as caught:
            chosen(f"{which} {count}", length)
        assert caught.value.diagnostics[0].code == "G131"
        return
    low = 0 if which == "first" else length - count
    agrees(f"{which} {count}", length, tuple(range(low, low + count)))


@given(LENGTH, st.integers(1, 100))
def test_shares_round_half_up(length: int, percent: int) -> None:
    count = floor((percent * length * 2 + 100) / 200)
    agrees(f"first {percent}%", length, tuple(range(count)))


def test_half() -> None:
    assert chosen("last half", 27) == tuple(range(13, 27))
    assert chosen("first half", 28) == tuple(range(14))


@pytest.mark.parametrize("text", ["0..30", "{0, 30}", "30", "29..31"])
def test_a_block_that_is_not_there(text: str) -> None:
    with pytest.raises(GraftError) as caught:
        chosen(text, 28)
    (found,) = caught.value.diagnostics
    assert found.code == "G131"
    assert found.span is not None
    assert "the last is 27" in (found.wanted or "")
    assert "`blocks`" in found.message


def test_a_measured_set_says_what_it_needs() -> None:
    with pytest.raises(GraftError) as caught:
        chosen("bottom 6 by influence", 28)
    (found,) = caught.value.diagnostics
    assert found.code == "G135"
    assert "DATA" in (found.wanted or "")


def test_an_exception_outside_the_chain() -> None:
    with pytest.raises(GraftError, match="G131"):
        chosen("all except {28}", 28)


def test_an_exception_that_takes_nothing_out() -> None:
    with pytest.raises(GraftError, match="G137"):
        chosen("odd except {0, 2}", 28)
