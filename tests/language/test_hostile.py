"""Hostile texts: a diagnostic with a place within half a second, and never a traceback."""

from __future__ import annotations

import random
import time
from pathlib import Path

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftc.diagnostics import GraftError, Source
from graftc.language.check import check

RULE = "rule r {\n  match a = self_attention in blocks odd\n"
HUGE = {
    "10 MB of one line": "x" * 10_000_000,
    "10 MB of lines": "set x = 4\n" * 1_000_000,
    "10 MB of brackets": "(" * 10_000_000,
    "900 kB of brackets": RULE + "where " + "(" * 900_000,
    "900 kB of digits": "set x = " + "9" * 900_000,
    "900 kB of quotes": '"' * 900_000,
    "900 kB of an open string": 'rule r "' + "x" * 900_000,
    "900 kB of odd characters": "é" * 900_000,
    "900 kB of signs": "§" * 900_000,
    "100 kB of not": RULE + "where " + "not " * 25_000 + "causal(a)\n}\n",
    "100 kB of minus": RULE + "where tokens(a) > " + "-" * 100_000 + "1\n}\n",
    "100 kB of plus": RULE + "where tokens(a) > 1" + " + 1" * 25_000 + "\n}\n",
    "100 kB of and": RULE + "where causal(a)" + " and causal(a)" * 7_000 + "\n}\n",
    "100 kB of dots": "use " + "a." * 50_000 + "b\n",
    "nested braces": RULE + "replace a with f(x = " + "{" * 100 + "}" * 100 + ")\n}\n",
    "nested calls": RULE + "replace a with " + "f(x = " * 100 + "1" + ")" * 100 + "\n}\n",
    "a huge exponent": "set x = 1e99999999999999999999\n",
    "a huge range": RULE.replace("odd", "0..999999999999") + "  remove a\n}\n",
    "a large range": RULE.replace("odd", "{0..99999, 5}") + "  remove a\n}\n",
    "a huge period": RULE.replace("odd", "1 of every 999999999999 from 999999999999")
    + "  remove a\n  expect x\n}\n",
    "null bytes": "rule\0r {}\n" * 100,
    "lone carriage returns": "rule r {\r match a = mlp\r remove a\r}\r",
    "surrogates": "rule \ud800 {}",
    "right to left": "rule \u202e r {}",
    "the same rule often": (RULE + "  remove a\n}\n") * 2_000,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_diagnostic_and_no_hang(name: str) -> None:
    check(fuzz.SEEDS[0])  # the parser is built once a process
    begin = time.process_time()
    with pytest.raises(GraftError) as caught:
        check(Source("a.graft", HUGE[name]))
    took = time.process_time() - begin
    assert all(d.span is not None for d in caught.value.diagnostics)
    assert len(str(caught.value)) < 1_000_000
    # A bound on hanging, far above what it takes: speed is measured in benchmarks/.
    assert took < 30, f"{took:.2f} s"


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
    for _ in range(600):
        fuzz.run(fuzz.mutated(rng))


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    fuzz.run(text)


@given(st.text(alphabet="0123456789.{},%abc stepofvryxl -", max_size=40))
def test_any_parameter(value: str) -> None:
    fuzz.run("set x = 8..20\n" + RULE.replace("odd", "x") + "  remove a\n}\n", {"x": value})


def test_a_long_file_in_a_few_seconds() -> None:
    body = RULE.partition("\n")[2] + "  where tokens(a) >= 64 and dim(a) % 4 == 0\n"
    body += "  replace a with hyena_x(kernel = 4)\n  init q = a.q, out = least_squares\n"
    body += "  distill l1, samples = 8k, lr = 1e-3\n  expect 14\n}\n"
    rules = [f"rule r{i} {{\n{body}" for i in range(1_250)]
    assert "".join(rules).count("\n") >= 10_000
    begin = time.process_time()
    check(Source("a.graft", "\n".join(rules)))
    assert time.process_time() - begin < 120  # a bound on hanging
