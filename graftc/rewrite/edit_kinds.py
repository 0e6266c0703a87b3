"""The table of edits: what each construct of the language becomes at a match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftc.language.rules import Insert, OneOf, Parallel, Remove, Replace, Rewrite, Skip
from graftc.rewrite.edit_insert import insert_edit
from graftc.rewrite.edit_one_of import one_of_edit
from graftc.rewrite.edit_parallel import parallel_edit
from graftc.rewrite.edit_rewrite import rewrite_edit
from graftc.rewrite.edits import Edit, Place, remove_edit, replace_edit, skip_edit

EDITS: Mapping[type, Callable[[Place, Any], Edit]] = {
    Replace: replace_edit,
    OneOf: one_of_edit,
    Parallel: parallel_edit,
    Insert: insert_edit,
    Remove: remove_edit,
    Skip: skip_edit,
    Rewrite: rewrite_edit,
}
