"""Hostile texts: a diagnostic with a place within half a second, and never a traceback."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.diagnostics import GraftError, Source
from graftc.language.check import check

RULE = fuzz.RULE


@pytest.mark.parametrize("name", fuzz.HUGE)
def test_a_diagnostic_and_no_hang(name: str) -> None:
    check(fuzz.SEEDS[0])  # the parser is built once a process
    text = fuzz.HUGE[name]()
    begin = time.process_time()
    with pytest.raises(GraftError) as caught:
        check(Source("a.graft", text))
    took = time.process_time() - begin
    assert all(d.span is not None for d in caught.value.diagnostics)
    assert len(str(caught.value)) < 1_000_000
    # A bound on hanging, far above what it takes: `make fuzz` reports the time.
    assert took < 30, f"{took:.2f} s"


def test_no_hostile_text_takes_more_than_500_mb() -> None:
    """In a process that is not given more."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (500_000_000,) * 2)\n"
        "import fuzz\n"
        "for _, name in fuzz.by_hand(): print(name)"
    )
    here = Path(__file__).parent
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(here)!r}]\n{script}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=here.parents[1])
    assert set(done.stdout.splitlines()) == set(fuzz.HUGE), done.stderr[-2000:]


@pytest.mark.parametrize("prefix", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_byte_order_marks_do_not_matter(
    prefix: str, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.graft"
    for seed in fuzz.SEEDS[:-1]:
        path.write_bytes((prefix + seed.replace("\n", end)).encode())
        assert len(check(path).rules) == len(check(Source("a.graft", seed)).rules)


def test_mutated_files() -> None:
    rng = random.Random(20)
    codes = Counter(fuzz.run(fuzz.mutated(rng)) for _ in range(2_000))
    assert codes["ok"] > 20
    assert len(codes) > 20  # they reach what a file means, not only how it is spelt


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    fuzz.run(text)


@given(st.text(alphabet="0123456789.{},%abc stepofvryxl -", max_size=40))
def test_any_parameter(value: str) -> None:
    fuzz.run("set x = 8..20\n" + RULE.replace("odd", "x") + "  remove a\n}\n", {"x": value})


def test_a_long_file_in_a_few_seconds() -> None:
    body = RULE.partition("\n")[2] + "  where tokens(a) >= NUMBER and dim(a) % 4 == 0\n"
    body += "  replace a with hyena_x(kernel = 4)\n  init q = a.q, out = least_squares\n"
    body += "  distill l1, samples = 8k, lr = 1e-3\n  expect 14\n}\n"
    rules = [f"rule r{i} {{\n{body}".replace("NUMBER", str(64 + i)) for i in range(1_250)]
    assert "".join(rules).count("\n") >= 10_000
    begin = time.process_time()
    check(Source("a.graft", "\n".join(rules)))
    assert time.process_time() - begin < 120  # a bound on hanging
