"""The overview of a model: its chains, their blocks, and the sites that people speak of, as plain data."""

from __future__ import annotations

from typing import Any

from graftc.program.analysis import Analysis, Site

_SHOWN = ("self_attention", "cross_attention", "joint_attention", "mlp", "unknown_attention")


def overview(analysis: Analysis) -> list[dict[str, Any]]:
    """Chains in order; of each block its path and the attentions and MLPs in it, in the data's order.

    >>> import torch
    >>> from graftc.program.analysis import analyse
    >>> from graftc.program.capture import capture
    >>> from graftc.program.model import Model
    >>> layer = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> blocks = torch.nn.Sequential(layer(), layer())
    >>> (chain,) = overview(analyse(capture(Model(blocks, {"input": torch.zeros(2, 3, 4)}))))
    >>> [b["path"] for b in chain["blocks"]]
    ['0', '1']
    """
    inside: dict[tuple[str, int], list[Site]] = {}
    for site in analysis.sites:
        if site.block is not None and site.role in _SHOWN:
            inside.setdefault(site.block, []).append(site)
    return [
        {
            "name": chain.name,
            "blocks": [
                {
                    "path": path,
                    "sites": [
                        {"path": s.path, "role": s.role} for s in inside.get((chain.name, i), [])
                    ],
                }
                for i, path in enumerate(chain.paths)
            ],
        }
        for chain in analysis.chains
    ]
