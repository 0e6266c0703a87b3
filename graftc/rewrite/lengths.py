"""Whether an operator that is built for one number of tokens, or that wants more than its window, meets such a site."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from graftc.diagnostics import Span, fail
from graftc.operators.spec import OperatorSpec, Value
from graftc.program.analysis import Analysis, Site
from graftc.program.flat import Op


def check_tokens(
    spec: OperatorSpec,
    arguments: Mapping[str, Value],
    site: Site,
    analysis: Analysis,
    span: Span,
) -> None:
    """Raise where the operator takes one token count and the site has another, or a free one."""
    if not spec.is_fixed(arguments):
        _check_beside(spec, arguments, site, span)
        return
    _check_free(spec, site, analysis, span)
    wanted, tokens = _built_for(arguments), site.facts.get("tokens")
    if wanted is None or not isinstance(tokens, int) or site.role == "joint_attention":
        return
    if tokens != wanted:
        grid = arguments.get("height"), arguments.get("width")
        of_grid = "tokens" not in arguments
        fail(
            "G366",
            f"`{spec.name}` is built for {wanted} tokens, and {site.path} has {tokens}",
            span=span,
            site=site.path,
            wanted=f"a grid of {grid[0]} x {grid[1]} tokens" if of_grid else f"{wanted} tokens",
            found=f"{tokens} tokens, built for {wanted}",
            help=_other_tokens(spec) if of_grid else "leave `tokens` out: it is the site's own",
        )


def _built_for(arguments: Mapping[str, Value]) -> int | None:
    tokens, height, width = (arguments.get(n) for n in ("tokens", "height", "width"))
    if isinstance(tokens, int):
        return tokens
    return height * width if isinstance(height, int) and isinstance(width, int) else None


def _other_tokens(spec: OperatorSpec) -> str:
    if spec.arg("groups") is not None:
        return "say which tokens are not on the grid: `groups = {text: full, image: local}`, in their order"
    return "give `graftc.Model(…, grid = (rows, columns))` the grid of these tokens"


def _check_free(spec: OperatorSpec, site: Site, analysis: Analysis, span: Span) -> None:
    """A dynamic dimension among the token dimensions of the stream."""
    call = analysis.flat.first_calls.get(site.path)
    stream = call.args[site.stream] if call is not None and site.stream < len(call.args) else None
    shape: tuple[Any, ...] = ()
    if isinstance(stream, Op) and stream.tensor is not None:
        shape = tuple(stream.tensor.shape)
    if not any(isinstance(d, torch.SymInt) for d in shape[1:-1]):
        return
    batch = analysis.program.inputs[0].shape[:1] if analysis.program.inputs else ()
    named = [n for n in analysis.program.facts.dynamic if n not in batch]
    fail(
        "G365",
        f"`{spec.name}` is built for one number of tokens, and {site.path} takes any",
        span=span,
        site=site.path,
        wanted=f"a fixed number of tokens, {prod(map(int, shape[1:-1]))} as in the example",
        found=f"dynamic: {', '.join(named)}",
        help="leave these dimensions out of `graftc.Model(…, dynamic = …)`, or choose an operator of any length",
    )


def _check_beside(
    spec: OperatorSpec, arguments: Mapping[str, Value], site: Site, span: Span
) -> None:
    """Of tokens of which some lie on a grid, there must be more than the grid has."""
    grid, tokens = _built_for(arguments), site.facts.get("tokens")
    if arguments.get("groups") is None or grid is None or not isinstance(tokens, int):
        return
    if tokens <= grid:
        fail(
            "G366",
            f"`{spec.name}` finds no tokens beside the grid at {site.path}",
            span=span,
            site=site.path,
            wanted=f"more than {grid} tokens",
            found=f"{tokens} tokens, a grid of {arguments['height']} x {arguments['width']}",
            help="leave `groups` out",
        )
