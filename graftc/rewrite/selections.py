"""What a selection should say for itself before it is applied: a glob that takes too much, a guard that leaves some out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from graftc.diagnostics import Diagnostic, fail
from graftc.language.rules import Rule, SiteMatch
from graftc.rewrite.match import Matches

_MOST_SHOWN = 6


def selection_notes(matches: Matches) -> Iterator[Diagnostic]:
    """Warnings and notes on what a rule selects. Raises GraftError where a module and one inside it are both taken."""
    rule = matches.rule
    for pattern in rule.matches:
        if isinstance(pattern, SiteMatch) and pattern.role is None:
            _check_nesting(rule, pattern, matches)
            yield from _several_kinds(rule, pattern, matches)
    if matches.filtered and rule.expect is None and rule.where is not None:
        count = len(matches.filtered)
        places = ", ".join(f.path for f in matches.filtered[:_MOST_SHOWN])
        more = f", … and {count - _MOST_SHOWN} more" if count > _MOST_SHOWN else ""
        yield Diagnostic(
            "G417",
            f"rule `{rule.name}` takes {len(matches.found)} of {count + len(matches.found)} places",
            span=rule.where.span,
            found=f"left out: {places}{more}",
            help=f"write `expect {len(matches.found)}` if that is meant",
            severity="note",
        )


def _check_nesting(rule: Rule, pattern: SiteMatch, matches: Matches) -> None:
    paths = {m.bindings[pattern.binding].path for m in matches.found}
    for path in sorted(paths):
        above = path
        while above := above.rpartition(".")[0]:
            if above in paths:
                fail(
                    "G414",
                    f"rule `{rule.name}` takes {above} and {path}, which lies in it",
                    span=pattern.span,
                    wanted="modules side by side",
                    found=f"{len(paths)} modules, one inside another",
                    help="`*` stands for what is between two dots: name the modules more closely",
                )


def _several_kinds(rule: Rule, pattern: SiteMatch, matches: Matches) -> Iterator[Diagnostic]:
    sites = [m.bindings[pattern.binding] for m in matches.found]
    kinds = Counter(
        s.role if s.role != "unknown" else (s.class_name.rpartition(".")[2] or "unknown")
        for s in sites
    )
    if len(kinds) > 1:
        listed = ", ".join(f"{n} {k}" for k, n in kinds.most_common(_MOST_SHOWN))
        yield Diagnostic(
            "G415",
            f"rule `{rule.name}` takes modules of {len(kinds)} kinds",
            span=pattern.span,
            wanted="modules of one kind",
            found=listed,
            help="name them more closely, or by role: `match a = mlp in blocks all`",
            severity="warning",
        )
