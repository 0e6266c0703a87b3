"""An analysis as `explain` reads it: sites by block and path, the ops below a path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from graftc.program.analysis import Analysis, Site
from graftc.program.flat import Op
from graftc.program.refusals import Refusal
from graftc.rewrite.dataflow.view import ProgramView, program_view
from graftc.rewrite.whynot.change import source_line

_TRIED = 8


@dataclass(frozen=True, eq=False)
class Places:
    """Lookups that the explanation of several rules shares."""

    analysis: Analysis

    @cached_property
    def ops_below(self) -> Mapping[str, tuple[int, int]]:
        """Path → the first and last op that stands in it or below, by index."""
        found: dict[str, tuple[int, int]] = {}
        for op in self.analysis.flat.ops:
            if op.kind not in ("op", "module"):
                continue
            path = op.path
            while path:
                known = found.get(path)
                found[path] = (known[0] if known else op.index, op.index)
                path = path.rpartition(".")[0]
        return found

    def ops_of(self, path: str) -> list[Op]:
        """The ops of a module and of those below it, in execution order."""
        if path not in self.ops_below:
            return []
        first, last = self.ops_below[path]
        inside = path + "."
        ops = self.analysis.flat.ops[first : last + 1]
        return [o for o in ops if o.kind == "op" and (o.path == path or o.path.startswith(inside))]

    def line(self, path: str) -> str | None:
        """The model's own line that runs first in a module, where capture kept one."""
        known = self.ops_below.get(path)
        ops = self.analysis.flat.ops[known[0] : known[1] + 1] if known else []
        return next((line for o in ops[:_TRIED] if (line := source_line(o)) is not None), None)

    @cached_property
    def view(self) -> ProgramView:
        """The ops as dataflow patterns see them."""
        return program_view(self.analysis.flat)

    def refusal(self, role: str, path: str) -> Refusal | None:
        """Why the ops of this module that look like the role are none."""
        return self._refusals.get((role, path))

    @cached_property
    def _refusals(self) -> Mapping[tuple[str, str], Refusal]:
        return {(r.role, r.path): r for r in reversed(self.analysis.refused)}

    @cached_property
    def by_block(self) -> Mapping[tuple[str, int], tuple[Site, ...]]:
        """(chain, index) → the block and the sites in it."""
        found: dict[tuple[str, int], list[Site]] = {}
        for site in self.analysis.sites:
            if site.block is not None:
                found.setdefault(site.block, []).append(site)
        return {k: tuple(v) for k, v in found.items()}
