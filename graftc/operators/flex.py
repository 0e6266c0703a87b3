"""Softmax attention of a window, or of discs of a grid, by FlexAttention: the form `flex` of the local operators.

On a GPU it is one kernel that leaves out the blocks of keys that no query of a block sees. What it leaves out is told
by the distance between blocks: nothing of tokens · tokens is ever made, and under `torch.compile` the table is a part
of the graph. (FlexAttention, arXiv 2412.05496.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from graftc.operators.heads import four_dimensions, shut
from graftc.operators.local_2d import DiscMixer, JointLocalAttention2d, LocalAttention2d
from graftc.operators.sliding_window import SlidingWindow

BLOCK = 128
"""Queries, and keys, of a block of the table: what FlexAttention's kernels take."""


def uses_flex(*given: Tensor) -> bool:
    """Whether FlexAttention computes this call: on a GPU, and in a compiled forward pass on a CPU.

    Not in an export, which has no op for it, nor on tensors without values (where memory is planned), which a kernel
    cannot read. The operator's own blocks compute the same.

    >>> uses_flex(torch.zeros(1))
    False
    """
    if torch.compiler.is_exporting() or any(type(t) is not Tensor for t in given):
        return False
    return has_kernel(*given)


def has_kernel(*given: Tensor) -> bool:
    """Whether FlexAttention has a kernel for these tensors, where they are and as they are used.

    Not in eager mode on a CPU, where it makes all scores, nor where it would have to be differentiated there, which
    it cannot be.

    >>> has_kernel(torch.zeros(1))
    False
    """
    if given[0].device.type == "cuda":
        return True
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return given[0].device.type == "cpu" and torch.compiler.is_compiling() and not learns


def window_blocks(tokens: int, before: int, after: int, device: torch.device) -> BlockMask:
    """Each token sees those from `before` earlier to `after` later ones.

    >>> window_blocks(300, 9, 9, torch.device("cpu")).to_dense().flatten().tolist()
    [1, 1, 0, 1, 1, 1, 0, 1, 1]
    """

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k - q >= -before) & (k - q <= after)

    block = torch.arange((tokens + BLOCK - 1) // BLOCK, device=device)
    apart = (block.unsqueeze(0) - block.unsqueeze(1)) * BLOCK  # of a key's block from a query's
    near = (apart + BLOCK - 1 >= -before) & (apart - BLOCK + 1 <= after)
    return _table(near, tokens, seen)


def disc_blocks(
    height: int, width: int, radius: int, first: int, tokens: int, device: torch.device
) -> BlockMask:
    """Tokens `first` … `first + height · width` lie on a grid and see those less than `radius` away there.

    All other tokens see all, and all see them. A block of queries is taken to see the blocks whose numbers are as
    near as those of a disc can be.

    >>> disc_blocks(16, 16, 2, 0, 256, torch.device("cpu")).to_dense().flatten().tolist()
    [1, 1, 1, 1]
    """
    last = first + height * width

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dy = (q - first) // width - (k - first) // width
        dx = (q - first) % width - (k - first) % width
        beside = (q < first) | (q >= last) | (k < first) | (k >= last)
        return beside | (dy * dy + dx * dx < radius * radius)

    reach = (radius - 1) * (width + 1)
    block = torch.arange((tokens + BLOCK - 1) // BLOCK, device=device)
    apart = (block.unsqueeze(0) - block.unsqueeze(1)).abs() * BLOCK
    beside = (block * BLOCK < first) | ((block + 1) * BLOCK > last)  # and the last one, filled up
    near = (apart - BLOCK + 1 <= reach) | beside.unsqueeze(0) | beside.unsqueeze(1)
    return _table(near, tokens, seen)


def _table(
    near: Tensor, tokens: int, seen: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> BlockMask:
    """The blocks of keys that each block of queries looks at, and which pairs in them are seen."""
    count = near.sum(-1, dtype=torch.int32)
    order = near.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        count[None, None],
        order[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
    )


@functools.lru_cache(maxsize=64)
def kept_window(tokens: int, before: int, after: int, device: torch.device) -> BlockMask:
    """A window's table, made once a length and device: for eager mode.

    What inference mode makes could not be used in training after it.
    """
    with torch.inference_mode(False):
        return window_blocks(tokens, before, after, device)


@functools.lru_cache(maxsize=64)
def kept_disc(
    height: int, width: int, radius: int, first: int, tokens: int, device: torch.device
) -> BlockMask:
    """A grid's table, likewise."""
    with torch.inference_mode(False):
        return disc_blocks(height, width, radius, first, tokens, device)


@functools.lru_cache(maxsize=1)
def compiled() -> Callable[..., Any]:
    """FlexAttention as a kernel, for eager mode: uncompiled it makes all scores."""
    return torch.compile(flex_attention)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockMask,
    scale: float,
    softcap: float | None,
    mask: Tensor | None,
) -> Tensor:
    """softmax(capped(scale · q kᵀ) + mask) v over what `blocks` shows; q, k, v: [batch, tokens, heads, head_dim].

    k and v may have fewer heads, shared by groups of q's. A mask is one that `four_dimensions` takes. A query all of
    whose keys are hidden gets zeros.
    """
    given = None if mask is None else four_dimensions(mask)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of q and k gives float32

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        if given is None:
            return s
        own = given[
            b if given.shape[0] > 1 else 0,
            h if given.shape[1] > 1 else 0,
            i if given.shape[2] > 1 else 0,
            j if given.shape[3] > 1 else 0,
        ]
        added = s if given.dtype == torch.bool else s + own
        return torch.where(shut(own), float("-inf"), added)

    run: Any = flex_attention if torch.compiler.is_compiling() else compiled()
    y = run(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=None if softcap is None and given is None else score,
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


class FlexWindow(SlidingWindow):
    """`SlidingWindow` through FlexAttention on a GPU; in blocks elsewhere, and in an export.

    >>> FlexWindow(dim=8, heads=2, window=4)(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    forms = ("flex",)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not q.numel() or not uses_flex(q, k, v):
            return super().mix(q, k, v, mask)
        make = window_blocks if torch.compiler.is_compiling() else kept_window
        after = 0 if self.causal else self.window
        blocks = make(q.shape[1], self.window, after, q.device)
        return flex(q, k, v, blocks, self.scale, self.softcap, mask)


class FlexDiscs(DiscMixer):
    """`DiscMixer` through FlexAttention on a GPU, the tokens that are not on the grid among the others."""

    forms = ("flex",)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: bool) -> Tensor:
        if not q.numel() or not uses_flex(q, k, v):
            return super().mix(q, k, v, mask, first)
        tokens = q.shape[1]
        start = 0 if first else tokens - self.height * self.width
        make = disc_blocks if torch.compiler.is_compiling() else kept_disc
        blocks = make(self.height, self.width, self.radius, start, tokens, q.device)
        return flex(q, k, v, blocks, self.scale, self.softcap, mask)


class FlexLocalAttention2d(FlexDiscs, LocalAttention2d):
    """`LocalAttention2d` through FlexAttention on a GPU; in tiles elsewhere, and in an export.

    >>> FlexLocalAttention2d(dim=8, heads=2, radius=2, height=4, width=6)(torch.zeros(1, 24, 8)).shape
    torch.Size([1, 24, 8])
    """


class FlexJointLocalAttention2d(FlexDiscs, JointLocalAttention2d):
    """`JointLocalAttention2d` likewise."""
