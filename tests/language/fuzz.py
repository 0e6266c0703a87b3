"""Mutated and random texts through `check`: a diagnostic with a place, soon, and never a traceback.

python tests/language/fuzz.py 20000 [seed]
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from pathlib import Path

from graftc.diagnostics import GraftError, Source, render
from graftc.language.check import check

SLOWEST = 60.0  # a bound on hanging, not a measure of speed
SEEDS = [
    p.read_text(encoding="utf-8") for p in (Path(__file__).parent.parent / "corpus").glob("*.graft")
]
SEEDS.append(
    """use interleaved_hyena from std.mixers
set middle = 8..20
rule halve "pairs" {
    match   a, b = each pair of blocks of "blocks" middle except {8, 9}
    where   dim(a) % 2 == 0 and not (heads(a) > 3 or -1 < 2)
    replace with parallel(a, b, merge = lerp(start = 0.5), norm = first)
    train   inserted
    expect  5
}
rule sdpa exact {
    match {
        p = softmax(matmul(q, transpose(k, -2, -1)) * scale, -1)
        o = (matmul | bmm)(maybe dropout(p), v, args…)
    }
    where   scale is number, shape(q) ~ [b, (h d), n, 64]
    rewrite { o = scaled_dot_product_attention(q, k, v, scale = scale) }
}
operator hyena_q(dim, kernel = 4) : (x: tokens[n, dim]) -> tokens[n, dim] {
    q, k, v = split(linear(x, 3 * dim, name = in_proj), 3)
    return linear(q * k * v, dim, name = out_proj)
}
test t of sdpa { before { p = matmul(q, k) } inputs q: tokens[2, 4], k = 3 after { p = bmm(q, k) } expect 1 }
"""
)
BITS = [
    *"(){}[],.:=<>+-*/%~|\"#\n\t \\\r\0;'`$@!?é“…\ufeff\u00a0\u202e😀",
    "..", "->", "==", "10%", "8k", "1e-3", "1e999", "9" * 400, "step2", "trainer", "rule", "match", "where", "in",
    "blocks", "of", "every", "except", "not ", "and", "or", "(" * 60, "{" * 60, "not " * 300, "-" * 300,
    "a + " * 300, "a.b.c", "hyena_x(", "std.x", "0..99999999", "{0..99999999}", '"', "use \"x\"\n", "set x = x\n",
    "\r\n", "true", "self_attention", "expect", "init", "zero", "a.q", "lora(", "parallel(", "copy(",
]  # fmt: skip


def mutated(rng: random.Random) -> str:
    """A seed with a few cuts, copies, swaps and insertions; sometimes only bits."""
    if rng.random() < 0.1:
        return "".join(rng.choice(BITS) for _ in range(rng.randrange(1, 60)))
    text = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 6)):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        end = min(end, at + rng.choice((1, 3, 20, 200)))
        action = rng.randrange(5)
        if action == 0:
            text = text[:at] + text[end:]
        elif action == 1:
            text = text[:at] + rng.choice(BITS) + text[at:]
        elif action == 2:
            text = text[:end] + text[at:]
        elif action == 3:
            words = text.split(" ")
            i, j = rng.randrange(len(words)), rng.randrange(len(words))
            words[i], words[j] = words[j], words[i]
            text = " ".join(words)
        else:
            other = rng.choice(SEEDS)
            cut = rng.randrange(len(other))
            text = text[:at] + other[cut : cut + 40] + text[end:]
    return text


def run(text: str, overrides: dict[str, str] | None = None) -> str:
    """The code of the first diagnostic, or "ok"; anything else is a bug, and raises."""
    begin = time.process_time()
    try:
        check(Source("fuzz.graft", text), overrides)
        code = "ok"
    except GraftError as error:
        for diagnostic in error.diagnostics:
            assert diagnostic.span is not None or diagnostic.site is not None, diagnostic
            assert render(diagnostic)
        code = error.diagnostics[0].code
    took = time.process_time() - begin
    assert took < SLOWEST, f"{took:.2f} s"
    return code


def main(count: int, seed: int) -> None:
    rng = random.Random(seed)
    check(SEEDS[0])
    codes: Counter[str] = Counter()
    for number in range(count):
        text = mutated(rng)
        try:
            codes[run(text)] += 1
        except BaseException:
            print(f"seed {seed}, text {number}:\n{text!r}", file=sys.stderr)
            raise
    print(dict(codes.most_common()))


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 2000,
        int(sys.argv[2]) if len(sys.argv) > 2 else 0,
    )
