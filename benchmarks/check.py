"""`graftc check` of a file of 10,000 lines, beside Lark's bare parse of it and Python's `compile` of as many lines.

    python benchmarks/check.py

The file has rules on sites with every clause, rules on pairs, dataflow rules and operators, no two alike. Lark's bare parse is Lark's
own LALR driver on the same tokens (Lark has no lexer for words that are keywords here and names there), which builds Lark's trees and
nothing else. Python's text has the same number of lines, of functions with calls, comparisons and arithmetic.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from lark import Lark
from lark import Token as LarkToken
from timing import Report, interleaved, median_ms, ratio

from graftc.diagnostics import Source
from graftc.language.check import check
from graftc.language.parser import grammar, parse
from graftc.language.resources import grammar_text
from graftc.language.tokens import lay_out, scan

LINES = 10_000
SITES = """# block {i}: its attention becomes a gated convolution
rule hyena_{i} "attention of block {i}" {{
    match   a = self_attention in blocks {{{i}}}
    where   tokens(a) >= 64 and dim(a) % 4 == 0, heads(a) > {n}
    replace a with hyena_x(kernel = {k})
    init    q = a.q, k = a.k, v = a.v
            out = least_squares
    distill l1, samples = 8k, lr = 1e-3
    expect  1
}}
"""
FLOW = """rule scaled_{i} exact {{
    match {{
        s = matmul(q, transpose(k, -2, -1)) * {i}.5
        p = softmax(s, -1)
        o = (matmul | bmm)(maybe dropout(p), v)
    }}
    where   shape(q) ~ [b, h, n, d]
    rewrite {{ o = scaled_dot_product_attention(q, k, v, scale = {i}.5) }}
}}
"""
OPERATOR = """operator gated_{i}(dim, kernel = {k}) : (x: tokens[n, dim]) -> tokens[n, dim] {{
    q, k, v = split(linear(x, 3 * dim, name = in_proj), 3)
    y = linear(q * depthwise_conv(k * v, kernel, causal = true), dim, name = out_proj)
    return y
}}
rule own_{i} {{
    match   a = mlp in blocks {{{i}}}
    replace a with mlp(ratio = {k})
    distill l2
}}
"""
PYTHON = """# block {i}: its attention becomes a gated convolution
def hyena_{i}(blocks, out=None):
    a = self_attention(blocks[{i}])
    if tokens(a) >= 64 and dim(a) % 4 == 0 and heads(a) > {n}:
        new = replace(a, hyena_x(kernel={k}))
        new.q, new.k, new.v = a.q, a.k, a.v
        new.out = least_squares(a, new)
        distill(new, "l1", samples=8_000, lr=1e-3)
        assert len(blocks) >= 1
    return new
"""


def written(part: Callable[[int], str], lines: int = LINES) -> str:
    """Parts one after the other, up to a number of lines."""
    found: list[str] = []
    count = number = 0
    while count < lines:
        found.append(part(number))
        count += found[-1].count("\n")
        number += 1
    return "".join(found)


def graft_part(i: int) -> str:
    values = {"i": i, "n": 1 + i % 7, "k": 2 + i % 5}
    return "".join(text.format(**values) for text in (SITES, FLOW, OPERATOR))


def python_part(i: int) -> str:
    return PYTHON.format(i=i, n=1 + i % 7, k=2 + i % 5)


def bare_parse(source: Source) -> Callable[[], object]:
    """Lark's own driver on this text's tokens, as the grammar reads them."""
    bare = Lark(grammar_text(), parser="lalr", lexer="basic", start="start", keep_all_tokens=True)

    def run() -> Any:
        raw, errors = scan(source, grammar().terminals)
        assert not errors
        driver: Any = bare.parse_interactive("")
        for token in lay_out(raw):
            kind = token.type
            if token.keyword is not None:
                kind = token.keyword if token.keyword in driver.choices() else "NAME"
            driver.feed_token(LarkToken(kind, token.value, token.start))
        return driver.feed_eof()

    return run


def measure(lines: int = LINES, rounds: int = 5) -> Report:
    """CPU time of each, taking turns."""
    import time

    text, python = written(graft_part, lines), written(python_part, lines)
    source = Source("a.graft", text)
    rules = check(source)
    runs: dict[str, Callable[[], object]] = {
        "graftc check": lambda: check(Source("a.graft", text)),
        "graftc, syntax alone": lambda: parse(Source("a.graft", text)),
        "Lark's bare parse": bare_parse(source),
        "Python's compile": lambda: compile(python, "a.py", "exec"),
    }
    found = interleaved(runs, rounds=rounds, warmup=1, clock=time.process_time)
    ours = found["graftc check"]
    rows = tuple(
        (
            name, f"{(python if 'Python' in name else text).count(chr(10)):,}", median_ms(seconds),
            f"{1e6 * statistics.median(seconds) / lines:.0f}", f"{ratio(ours, seconds):.2f}x",
        )
        for name, seconds in found.items()
    )  # fmt: skip
    return Report(
        "Check of a long file",
        ("what", "lines", "CPU time", "µs a line", "graftc check / this"),
        rows,
        (
            f"{len(rules.rules):,} rules, {len(text):,} characters. CPU time, medians of {rounds} rounds that take turns; the ratio is the median of "
            "the rounds' ratios. `check` stops Python's search for cycles while it runs, the others do not. Python's text is another one, with as many lines and about as many words a line. "
            "`python benchmarks/check.py`.",
        ),
    )


if __name__ == "__main__":
    print(measure().markdown())
