"""What the operators with heads share: sizes, the split of q|k|v, masks, rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor


def head_sizes(
    operator: str, dim: int, heads: int, kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """(kv_heads, head_dim) where they are not given: as many as heads, of dim / heads each.

    >>> head_sizes("attention", 8, 4, None, None)
    (4, 2)
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{operator}: heads {heads} is not a multiple of kv_heads {kv_heads}")
    if head_dim is None and dim % heads:
        raise ValueError(f"{operator}: dim {dim} is not divisible by heads {heads}")
    return kv_heads, dim // heads if head_dim is None else head_dim


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, form: str) -> Tensor:
    """x with rotary positions (arXiv 2104.09864); x: [batch, tokens, heads, width].

    cos, sin: [tokens, r], [batch, tokens, r] or [batch, 1, tokens, r], for the first r features.
    `half`: feature i turns with feature i + r/2; `interleaved`: with its neighbour; `none`: x.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> rotate(x, torch.zeros(1, 4), torch.ones(1, 4), "half").flatten().tolist()
    [-3.0, -4.0, 1.0, 2.0]
    """
    if form == "none":
        return x
    if cos is None or sin is None:
        raise ValueError("rotary positions are built in, and cos and sin are not given")
    cos, sin = (
        t.transpose(1, 2) if t.ndim == 4 else t.unsqueeze(-2)  # the heads go before the features
        for t in (cos, sin)
    )
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if form == "half":
        other = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    else:
        pairs = turned.unflatten(-1, (width // 2, 2))
        other = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    turned = (turned * cos + other * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def check_rotary(operator: str, form: str) -> str:
    """The name of a form of rotary positions, or ValueError."""
    if form not in ("none", "half", "interleaved"):
        raise ValueError(f"{operator}: unknown rotary {form!r}, wanted none, half or interleaved")
    return form


def hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask: added, or where it is boolean, False hides.

    The lowest number stands for -inf, so that a row that sees nothing does not become NaN.
    """
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores + mask).clamp(min=torch.finfo(scores.dtype).min)


def four_dimensions(mask: Tensor) -> Tensor:
    """A mask as [batch, heads, queries, keys]: of three it is of all heads, of two of all samples.

    >>> four_dimensions(torch.zeros(2, 1, 5)).shape
    torch.Size([2, 1, 1, 5])
    """
    if mask.ndim == 3:
        return mask.unsqueeze(1)
    return mask.unsqueeze(0).unsqueeze(0) if mask.ndim == 2 else mask


def broadcast_mask(mask: Tensor, batch: int, heads: int, tokens: int) -> Tensor:
    """A mask that is of size 1 in some dimensions as [batch, heads, queries, keys]."""
    return four_dimensions(mask).expand(batch, heads, tokens, tokens)
