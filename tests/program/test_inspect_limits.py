"""`graftc inspect` on two diffusers transformers at their real configs, within the limits of a small machine.

Limits on time and memory: no part of the ordinary tests.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.program.limits import ROOT, measured

SECONDS = 30
BYTES = 1.5e9


def inspect(function: str) -> tuple[dict[str, object], float, int]:
    model = f"{ROOT}/examples/diffusers/models.py:{function}"
    text, seconds, peak = measured("inspect", model, "--format", "json")
    return json.loads(text), seconds, peak


@pytest.mark.slow
@pytest.mark.parametrize(
    # diffusers gives each block of DiT-XL/2 an embedder of its own: more than the 675 M of the paper.
    ("function", "cross", "parameters"),
    [("dit_xl2", 0, 749_808_016), ("pixart_sigma_2k", 28, 611e6)],
)
def test_28_blocks_within_limits(function: str, cross: int, parameters: float) -> None:
    found, seconds, peak = inspect(function)
    (chain,) = found["chains"]  # type: ignore[misc]
    assert len(chain["blocks"]) == 28
    roles = Counter(s["role"] for s in found["sites"] if s["block"])  # type: ignore[attr-defined, union-attr, index]
    assert (roles["self_attention"], roles["cross_attention"], roles["mlp"]) == (28, cross, 28)
    assert found["parameters"] == pytest.approx(parameters, rel=0.03)
    assert found["flops"] > 0  # type: ignore[operator]
    assert peak <= BYTES
    assert seconds <= SECONDS
