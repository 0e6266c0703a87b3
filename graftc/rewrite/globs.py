"""Module paths as patterns: `*` stays within a name, `**` crosses dots."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    wild = {"**": ".*", "*": r"[^.]*"}
    return re.compile("".join(wild.get(p, re.escape(p)) for p in parts))


def path_matches(pattern: str, path: str) -> bool:
    """Whether a module path fits a pattern.

    >>> path_matches("blocks.*.ff", "blocks.3.ff"), path_matches("blocks.*", "blocks.3.ff")
    (True, False)
    >>> path_matches("**.ff", "blocks.3.ff")
    True
    """
    return _compiled(pattern).fullmatch(path) is not None
