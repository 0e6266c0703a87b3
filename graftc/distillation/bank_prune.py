"""Which entries of a bank are meant: for a list, or to be taken out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

from graftc.distillation.bank import Bank, Entry


@dataclass(frozen=True)
class Chosen:
    """Conditions that all hold; None and False are none.

    `site`, `operator`: globs. `older_than`: days since it was written. `not_best`: another entry of the
    same problem, trained on the same data, has a lower error. `damaged`: see `Bank.damaged`.
    """

    site: str | None = None
    operator: str | None = None
    older_than: float | None = None
    not_best: bool = False
    damaged: bool = False

    @property
    def anything(self) -> bool:
        given = (self.site, self.operator, self.older_than)
        return self.not_best or self.damaged or any(g is not None for g in given)


def select(bank: Bank, chosen: Chosen) -> list[Entry]:
    """The entries that are meant. Raises GraftError (G572) for one that cannot be read, but with `damaged`."""
    if chosen.damaged:
        found = [e for e in bank.damaged() if isinstance(e, Entry)]
    else:
        found = bank.entries()
    best = _best(found) if chosen.not_best else set[str]()
    now = time.time()

    def meant(entry: Entry) -> bool:
        days = (now - (entry.path / "entry.yaml").stat().st_mtime) / 86400
        return (
            (chosen.site is None or fnmatchcase(entry.identity.site, chosen.site))
            and (chosen.operator is None or fnmatchcase(entry.identity.operator, chosen.operator))
            and (chosen.older_than is None or days > chosen.older_than)
            and entry.key not in best
        )

    return [e for e in found if meant(e)]


def _best(entries: list[Entry]) -> set[str]:
    """Of each problem and data, the entry with the lowest error; the one that a compile would take."""
    found: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        training = entry.identity.training or {}
        key = (entry.identity.problem_key, str(training.get("data")), str(training.get("after")))
        other = found.get(key)
        if other is None or (entry.error, entry.key) < (other.error, other.key):
            found[key] = entry
    return {e.key for e in found.values()}
