"""Names of rules: each once, and those that `after`, `use` and `test` speak of are there."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from graftc.diagnostics import Diagnostic, Instead, fail, nearest
from graftc.language import syntax as s
from graftc.language.scope import Log, already, listed


def check_used_names(names: Sequence[s.Name], document: s.Document) -> None:
    """Every name of `use a, b from …` is a rule or an operator of the file. Raises GraftError."""
    known = tuple(
        i.name.text for i in document.items if isinstance(i, (s.RuleItem, s.OperatorItem))
    )
    for name in names:
        if name.text not in known:
            near = nearest(name.text, known)
            fail(
                "G111",
                f"`{Path(document.source.name).name}` has no rule or operator `{name.text}`",
                span=name.span,
                wanted=listed(known) or "a rule",
                found=f"`{name.text}`",
                help=Instead(near) if near else None,
            )


def check_rule_names(items: Sequence[s.RuleItem], log: Log) -> None:
    """No two rules have one name."""
    seen: dict[str, s.RuleItem] = {}
    for item in items:
        name = item.name
        if name.text in seen:
            message, first = f"two rules are called `{name.text}`", seen[name.text].name.span
            log.add(already("G115", message, name.span, first, "give one another name"))
        seen.setdefault(name.text, item)


def check_after(items: Sequence[s.RuleItem], log: Log) -> None:
    """Every rule that another waits for is there, and none waits for itself."""
    after = {i.name.text: [n for h in i.head for n in h.names] for i in items}
    for name, earlier in after.items():
        for word in earlier:
            if word.text == name:
                log.add(
                    Diagnostic(
                        "G127",
                        f"rule `{name}` cannot come after itself",
                        span=word.span,
                        help="leave out `after`",
                    )
                )
            elif word.text not in after:
                unknown_rule(
                    word, set(after) - {name}, "a rule of this file or of one that it uses", log
                )
    graph = {name: {w.text for w in words} & (set(after) - {name}) for name, words in after.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = [str(n) for n in error.args[1]]  # each name comes before the next
        word = next(w for w in after[cycle[1]] if w.text == cycle[0])
        log.add(
            Diagnostic(
                "G127",
                "these rules wait for each other: " + ", ".join(dict.fromkeys(cycle)),
                span=word.span,
                help="leave out one `after`",
            )
        )


def unknown_rule(name: s.Name, known: set[str], wanted: str, log: Log) -> None:
    """A diagnostic for a rule that is not there."""
    near = nearest(name.text, sorted(known))
    with log.attempt():
        fail(
            "G111",
            f"unknown rule `{name.text}`",
            span=name.span,
            wanted=wanted
            + (": " + ", ".join(f"`{k}`" for k in sorted(known)[:12]) if known else ""),
            found=f"`{name.text}`",
            help=Instead(near) if near else None,
        )
