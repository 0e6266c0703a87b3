"""Why not: for a place that a rule does not select, the smallest script of changes that would make it.

Costs are additive: 1 is one plain difference (a guard, a block, an op), less where two things are alike.
"""

from graftc.rewrite.whynot.change import Change, Miss
from graftc.rewrite.whynot.explain import (
    Explanation,
    explain,
    explanations_dict,
    near_misses,
    with_near_misses,
)

__all__ = [
    "Change",
    "Explanation",
    "Miss",
    "explain",
    "explanations_dict",
    "near_misses",
    "with_near_misses",
]
