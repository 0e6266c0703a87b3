"""Chains and edits as plain data, for drawings."""

from __future__ import annotations

from typing import Any


def chain(blocks: int, name: str = "blocks", *, cross: bool = False) -> dict[str, Any]:
    roles = {
        "attn": "self_attention",
        **({"cross": "cross_attention"} if cross else {}),
        "mlp": "mlp",
    }
    return {
        "name": name,
        "blocks": [
            {
                "path": f"{name}.{i}",
                "sites": [{"path": f"{name}.{i}.{n}", "role": r} for n, r in roles.items()],
            }
            for i in range(blocks)
        ],
    }  # fmt: skip


def edit(
    kind: str, after: str, *sites: str, rule: str = "r", before: str = "self_attention"
) -> dict[str, Any]:
    return {
        "site": "+".join(sites), "sites": list(sites), "rule": rule, "edit": kind, "after": after, "before": before,
    }  # fmt: skip


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        edit(
            "parallel",
            f"parallel(blocks.{i}, blocks.{i + 1}, merge = linear)",
            f"blocks.{i}",
            f"blocks.{i + 1}",
            rule="pairs",
        )
        for i in range(0, count, 2)
    ]


HYENA = [
    edit("replace", "hyena_x(kernel = 4, causal = true)", f"blocks.{i}.attn", rule="hyena")
    for i in range(8, 21, 2)
]
EVERYTHING = [
    *HYENA,
    edit("remove", "nothing (contributes zero)", "blocks.3.cross", rule="no_cross"),
    edit("skip", "the identity on the residual stream", "blocks.5", rule="shallow"),
    edit("insert", "copy(blocks.6) after blocks.6", "blocks.6", rule="deeper"),
    edit("insert", "depthwise_conv(kernel = 3) after blocks.7.attn", "blocks.7.attn", rule="conv"),
    edit("replace", "low_rank(rank = 8)", "blocks.9.mlp.up", rule="thin"),
    edit("together", "parallel(blocks.21.attn, blocks.21.mlp, merge = sum, norm = first)",
         "blocks.21.attn", "blocks.21.mlp", rule="beside"),
    edit("parallel", "parallel(blocks.23, blocks.23_graft0, merge = lerp)", "blocks.23", rule="wider"),
    edit("parallel", "parallel(blocks.24, blocks.25, blocks.26, merge = sum)",
         "blocks.24", "blocks.25", "blocks.26", rule="triple"),
    edit("replace", "rms_norm(eps = 1e-06)", "final_norm", rule="norms", before="norm"),
]  # fmt: skip
