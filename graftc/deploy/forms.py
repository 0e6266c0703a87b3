"""Forms that a runtime does not take, or only at a price: refused by name, with the formulation to use instead."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch

from graftc.deploy.regions import region_of, site_of
from graftc.diagnostics import Diagnostic, GraftError, Note

_CONVOLUTION = (
    "write the long convolution as a product with a Toeplitz matrix, or as a depthwise convolution"
)
_BLOCKS = "write it with reshape, transpose and a gather by constant indices"
_GATHER = (
    "gather in place of scattering: a product with a constant 0/1 matrix, or index_select and a sum"
)

FORMS: Mapping[str, tuple[str, str]] = {
    r"fft_|_fft_|stft|istft": ("FFT", _CONVOLUTION),
    r"col2im": ("fold", _BLOCKS),
    r"im2col|unfold": ("unfold", _BLOCKS),
    r"scatter_add|scatter_reduce|index_add|index_reduce": ("scatter-add", _GATHER),
}
"""Words of an ATen operator's name → what it is called, and what to write."""

_UNROLLED = 256
"""As many calls of one operator in one region are a loop that tracing unrolled: one step a token."""


def check_forms(exported: torch.export.ExportedProgram, sites: Mapping[str, str]) -> None:
    """Raises GraftError for a forbidden form, with its region, rule and line."""
    counts: Counter[tuple[str, str]] = Counter()
    for node in exported.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.partition("::")[2]
        path = _path(node)
        accumulates = name.startswith("index_put") and len(node.args) > 3 and bool(node.args[3])
        for words, (form, instead) in FORMS.items():
            if re.search(words, name) or (accumulates and form == "scatter-add"):
                _refuse(form, f"aten.{name}", path, sites, instead)
        counts[(region_of(path, sites), name)] += 1
    for (region, name), count in counts.items():
        if count >= _UNROLLED and name not in ("view", "reshape", "slice", "select", "unsqueeze"):
            _refuse("unrolled loop", f"{count} times aten.{name}", region, sites,
                    "write the recurrence in chunks, as matrix products (as mamba2's SSD form does)")  # fmt: skip


def _path(node: torch.fx.Node) -> str:
    stack: Mapping[str, tuple[str, type]] = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values())) if path), "")


def _refuse(form: str, operator: str, path: str, sites: Mapping[str, str], instead: str) -> None:
    site = site_of(path, sites)
    rule = (Note(f"made by rule {sites[site]}"),) if site else ()
    raise GraftError(
        Diagnostic("G670", f"{form} ({operator}) has no portable form in ONNX and TensorRT", site=path or "the model",
                   notes=rule, help=instead)
    )  # fmt: skip
