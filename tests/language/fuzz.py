"""Mutated and random texts through `check` and `fmt`: a diagnostic with a place, soon, and never a traceback.

`make fuzz` runs this file: 20,000 texts by Hypothesis, then those that a person would try by hand, then as many
by atheris (coverage-guided) where it is installed, else NOT RUN.

python tests/language/fuzz.py [--count 20000] [--seed 0] [--atheris]
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from graftc.diagnostics import GraftError, Source, render
from graftc.language.check import check
from graftc.language.formatter import laid_out, meaning
from graftc.language.parser import grammar, parse
from graftc.language.tokens import scan
from graftc.language.vocabulary import DISTILL, FACTS, FINETUNE, LOSSES, POLICIES, ROLES
from graftc.operators.specs import MERGES, SPECS

SLOWEST = 60.0  # a bound on hanging, not a measure of speed
WANTED_SECONDS = 0.5
WANTED_BYTES = 500_000_000
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


WORDS = [
    *(*ROLES, *FACTS, *POLICIES, *DISTILL, *FINETUNE, *LOSSES, *SPECS, *MERGES),
    *("a", "b", "x", "n", "which", "parallel", "copy", "lora", "keep", "std", "mixers", "middle", "true", "is", "number"),
]  # fmt: skip
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "28",
    "0.5",
    "1e-3",
    "8k",
    "2M",
    "10%",
    "100%",
    "0%",
    "999999999999999",
    "1e30",
]
RULE = "rule r {\n  match a = self_attention in blocks odd\n"
HUGE: dict[str, Callable[[], str]] = {
    "10 MB of one line": lambda: "x" * 10_000_000,
    "10 MB of lines": lambda: "set x = 4\n" * 1_000_000,
    "10 MB of brackets": lambda: "(" * 10_000_000,
    "10 MB of rules": lambda: (RULE + "  remove a\n}\n") * 180_000,
    "900 kB of brackets": lambda: RULE + "where " + "(" * 900_000,
    "900 kB of digits": lambda: "set x = " + "9" * 900_000,
    "900 kB of quotes": lambda: '"' * 900_000,
    "900 kB of an open string": lambda: 'rule r "' + "x" * 900_000,
    "900 kB of odd characters": lambda: "é" * 900_000,
    "900 kB of signs": lambda: "§" * 900_000,
    "900 kB of comment": lambda: "#" * 900_000,
    "900 kB of blanks": lambda: " " * 900_000 + "rule",
    "900 kB of empty lines": lambda: "\n" * 900_000 + "rule",
    "100 kB of not": lambda: RULE + "where " + "not " * 25_000 + "causal(a)\n}\n",
    "100 kB of minus": lambda: RULE + "where tokens(a) > " + "-" * 100_000 + "1\n}\n",
    "100 kB of plus": lambda: RULE + "where tokens(a) > 1" + " + 1" * 25_000 + "\n}\n",
    "100 kB of and": lambda: RULE + "where causal(a)" + " and causal(a)" * 7_000 + "\n}\n",
    "100 kB of dots": lambda: "use " + "a." * 50_000 + "b\n",
    "100 kB of items": lambda: RULE + "where tokens(a) in {" + "1, " * 33_000 + "2}\n}\n",
    "100 kB of arguments": lambda: RULE + "replace a with hyena_x(" + "kernel = 4, " * 8_000 + ")\n}\n",
    "100 kB of names": lambda: "use " + "a, " * 33_000 + "b from std.mixers\n",
    "nested braces": lambda: RULE + "replace a with f(x = " + "{" * 100 + "}" * 100 + ")\n}\n",
    "nested calls": lambda: RULE + "replace a with " + "f(x = " * 100 + "1" + ")" * 100 + "\n}\n",
    "a huge exponent": lambda: "set x = 1e99999999999999999999\n",
    "a huge range": lambda: RULE.replace("odd", "0..999999999999") + "  remove a\n}\n",
    "a large range": lambda: RULE.replace("odd", "{0..99999, 5}") + "  remove a\n}\n",
    "a huge step": lambda: RULE.replace("odd", "0..999999999 step 999999999999") + "  remove a\n expect x\n}\n",
    "a huge period": lambda: RULE.replace("odd", "1 of every 999999999999 from 999999999999") + "  remove a\n  expect x\n}\n",
    "null bytes": lambda: "rule\0r {}\n" * 100,
    "lone carriage returns": lambda: "rule r {\r match a = mlp\r remove a\r}\r",
    "surrogates": lambda: "rule \ud800 {}",
    "right to left": lambda: "rule \u202e r {}",
    "look-alike letters": lambda: "rulе r {}",
    "a number runs into a word": lambda: RULE.replace("odd", "0..8 step2") + "  remove a\n}\n",
    "a word runs into a word": lambda: "rule r {\n match b = block in blocks odd\n skip b trainer\n}\n",
    "the same rule often": lambda: (RULE + "  remove a\n}\n") * 2_000,
    "a missing file": lambda: 'use "not_there.graft"\n',
    "a file outside": lambda: 'use "../../etc/passwd"\n',
    "an absolute file": lambda: 'use "/etc/passwd"\n',
}  # fmt: skip
"""What a person would try by hand; each must give a diagnostic with a place."""


def mutated(rng: random.Random) -> str:
    """A text: bits, a seed with changed characters or changed words, or one grown from the grammar."""
    kind = rng.random()
    if kind < 0.08:
        return "".join(rng.choice(BITS) for _ in range(rng.randrange(1, 60)))
    if kind < 0.2:
        return grown(rng)
    text = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 6)):
        text = _other_words(rng, text) if kind < 0.65 else _other_characters(rng, text)
    return text


def _other_characters(rng: random.Random, text: str) -> str:
    """A cut, a copy, a swap or an insertion, anywhere."""
    at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    end = min(end, at + rng.choice((1, 3, 20, 200)))
    action = rng.randrange(5)
    if action == 0:
        return text[:at] + text[end:]
    if action == 1:
        return text[:at] + rng.choice(BITS) + text[at:]
    if action == 2:
        return text[:end] + text[at:]
    if action == 3:
        words = text.split(" ")
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i], words[j] = words[j], words[i]
        return " ".join(words)
    other = rng.choice(SEEDS)
    cut = rng.randrange(len(other))
    return text[:at] + other[cut : cut + 40] + text[end:]


def _other_words(rng: random.Random, text: str) -> str:
    """Another word for a word, another number for a number; a line gone, twice or elsewhere.

    Most such texts still parse, so that the mistakes lie in what they mean.
    """
    if rng.random() < 0.35:
        lines = text.split("\n")
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines) + 1)
        line = lines[at] if rng.random() < 0.5 else lines.pop(at)
        if rng.random() < 0.6:
            lines.insert(min(to, len(lines)), line)
        return "\n".join(lines)
    tokens, _ = scan(Source("a", text), grammar().terminals)
    words = [t for t in tokens if t.type in ("NAME", "NUMBER", "PERCENT", "STRING")]
    if not words:
        return text
    token = rng.choice(words)
    if token.type == "NAME":
        new = rng.choice((rng.choice(WORDS), rng.choice(words).value, token.value[:-1] or "q"))
    else:
        new = rng.choice((rng.choice(NUMBERS), rng.choice(words).value))
    return text[: token.start] + new + text[token.end :]


@lru_cache(maxsize=1)
def _expansions() -> tuple[dict[str, list[list[Any]]], dict[str, int]]:
    """Rule → its expansions, and the depth of its shallowest tree."""
    rules: dict[str, list[list[Any]]] = {}
    for rule in grammar().lark.rules:
        rules.setdefault(str(rule.origin.name), []).append(list(rule.expansion))
    depth = {s.name: 0 for all_ in rules.values() for one in all_ for s in one if s.is_term}
    while len(depth) < len(rules) + len([d for d in depth.values() if d == 0]):
        for name, all_ in rules.items():
            known = [[depth.get(str(s.name)) for s in one] for one in all_]
            least = [
                max((d for d in one if d is not None), default=0)
                for one in known
                if None not in one
            ]
            if name not in depth and least:
                depth[name] = 1 + min(least)
    return rules, depth


_LONGEST_GROWN = 150


def grown(rng: random.Random) -> str:
    """A text of the grammar: every construct, beside any other."""
    rules, depth = _expansions()
    written = {n: v for v, n in grammar().terminals.keywords.items()}
    signs = {t.name: str(t.pattern.value) for t in grammar().lark.terminals}
    made = {
        "NAME": lambda: rng.choice(WORDS),
        "NUMBER": lambda: rng.choice([n for n in NUMBERS if "%" not in n]),
        "PERCENT": lambda: rng.choice(["10%", "0.5%", "100%"]),
        "STRING": lambda: rng.choice(['"blocks"', '"a.*.b"', '""', '"f.py:g"', '"\\""']),
        "ELLIPSIS": lambda: rng.choice(["...", "…"]),
        "NL": lambda: rng.choice(["\n", "\n\n", "  # why\n"]),
    }
    out: list[str] = []

    def grow(name: str, budget: int) -> None:
        if name not in rules:
            out.append(made[name]() if name in made else written.get(name, signs[name]))
            return
        choices = rules[name]
        if budget <= 0 or len(out) > _LONGEST_GROWN:
            price = [max((depth[str(s.name)] for s in one), default=0) for one in choices]
            choices = [c for c, p in zip(choices, price, strict=True) if p == min(price)]
        for symbol in rng.choice(choices):
            grow(str(symbol.name), budget - 1)

    for _ in range(rng.randrange(1, 4)):
        grow(
            rng.choice(("rule", "rule", "set", "use", "operator", "test", "finetune")),
            rng.randrange(8, 40),
        )
    return " ".join(out)


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


def layout(text: str) -> bool:
    """Whether the text parses; if so the formatter must keep its meaning, and be idempotent."""
    source = Source("a", text)
    try:
        parse(source)
    except GraftError:
        return False
    once = Source("a", laid_out(source))
    assert meaning(once) == meaning(source), text
    assert laid_out(once) == once.text, text
    return True


def by_hypothesis(count: int, seed: int) -> dict[str, Any]:
    """Runs `count` texts; their codes, how many `fmt` laid out, and the slowest."""
    import hypothesis
    from hypothesis import strategies as st

    codes: Counter[str] = Counter()
    slowest: list[tuple[float, str]] = []
    laid = 0
    random_ = st.randoms(use_true_random=True).map(mutated)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.integers(0, 9).flatmap(lambda n: st.text(max_size=300) if n == 0 else random_)
    )
    def one(text: str) -> None:
        nonlocal laid
        begin = time.process_time()
        codes[run(text)] += 1
        slowest.append((time.process_time() - begin, text))
        slowest.sort(reverse=True)
        del slowest[5:]
        laid += layout(text)

    one()
    return {"codes": codes, "formatted": laid, "slowest": slowest}


def by_hand() -> list[tuple[float, str]]:
    """Runs the hostile texts; CPU seconds of each."""
    took: list[tuple[float, str]] = []
    for name, text in HUGE.items():
        made = text()
        begin = time.process_time()
        assert run(made) != "ok", name
        took.append((time.process_time() - begin, name))
    return sorted(took, reverse=True)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_atheris(count: int, seed: int) -> None:
    """Coverage-guided, in this process; atheris ends it."""
    import atheris

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        run(text)
        layout(text)

    folder = Path("/tmp") / f"graft-fuzz-{seed}"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(SEEDS):
        (folder / f"{number}.graft").write_text(text, encoding="utf-8")
    atheris.instrument_all()
    atheris.Setup(
        [
            sys.argv[0],
            f"-runs={count}",
            f"-seed={seed + 1}",
            "-timeout=10",
            "-rss_limit_mb=500",
            str(folder),
        ],
        one,
    )
    atheris.Fuzz()


def main() -> int:
    """Run, say what was found, and return 1 where a bound was passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="only the coverage-guided texts")
    words = parser.parse_args()
    check(SEEDS[0])  # builds the parser, once a process
    if words.atheris:
        by_atheris(words.count, words.seed)
        return 0
    found = by_hypothesis(words.count, words.seed)
    hand = by_hand()
    print(f"{sum(found['codes'].values()):,} texts: {dict(found['codes'].most_common())}")
    print(
        f"{found['formatted']:,} of them parse; formatting kept their meaning, and formatting again changed nothing"
    )
    slowest = ", ".join(f"{s:.3f} s ({len(text):,} characters)" for s, text in found["slowest"])
    print(f"slowest, in CPU time: {slowest}")
    print("by hand: " + ", ".join(f"{name} {s:.3f} s" for s, name in hand[:5]))
    print(f"memory at its peak: {peak_bytes() / 1e6:.0f} MB")
    slow = [s for s, _ in (*found["slowest"], *hand) if s > WANTED_SECONDS]
    if importlib.util.find_spec("atheris") is None:
        print("atheris: NOT RUN (not installed; `pip install atheris`)")
    else:
        again = [
            sys.executable,
            __file__,
            "--atheris",
            f"--count={words.count}",
            f"--seed={words.seed}",
        ]
        done = subprocess.run(again, capture_output=True, text=True)
        print("atheris: " + (done.stderr.strip().splitlines() or ["said nothing"])[-1])
        if done.returncode:
            print(done.stderr[-4000:])
            return 1
    if slow or peak_bytes() > WANTED_BYTES:
        print(
            f"TOO SLOW: {len(slow)} texts took more than {WANTED_SECONDS} s"
            if slow
            else "TOO MUCH MEMORY"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
