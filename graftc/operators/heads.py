"""What the operators with heads share: sizes, the split of q|k|v, masks, rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    cos, sin: [tokens, r], [batch, tokens, r], [batch, 1, tokens, r] or [batch, tokens, 1, r], for the first r
    features. `half`: feature i turns with feature i + r/2; `interleaved`: with its neighbour; `pairs`: so too, by one
    angle, its cos read at the first feature of the pair and its sin at the second; `none`: x.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> rotate(x, torch.zeros(1, 4), torch.ones(1, 4), "half").flatten().tolist()
    [-3.0, -4.0, 1.0, 2.0]
    """
    if form == "none":
        return x
    if cos is None or sin is None:
        raise ValueError("rotary positions are built in, and cos and sin are not given")
    if form == "pairs":
        cos, sin = cos[..., 0::2].repeat_interleave(2, -1), sin[..., 1::2].repeat_interleave(2, -1)
    cos, sin = (  # the heads go before the features
        t.unsqueeze(-2) if t.ndim < 4 else t.transpose(1, 2) if t.shape[1] == 1 else t
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
    if form not in ("none", "half", "interleaved", "pairs"):
        raise ValueError(
            f"{operator}: unknown rotary {form!r}, wanted none, half, interleaved or pairs"
        )
    return form


def make_norm(
    operator: str,
    kind: str,
    over: str | None,
    heads: int,
    head_dim: int,
    eps: float | None,
    affine: bool | None,
) -> nn.RMSNorm | nn.LayerNorm | None:
    """The norm of q or of k: over each head's features, or over the `width` of all heads.

    >>> make_norm("attention", "rms_norm", "width", heads=2, head_dim=4, eps=1e-6, affine=True)
    RMSNorm((8,), eps=1e-06, elementwise_affine=True)
    """
    if kind not in ("none", "rms_norm", "layer_norm"):
        raise ValueError(f"{operator}: unknown qk_norm {kind!r}, wanted none, rms_norm, layer_norm")
    if over not in (None, "head", "width"):
        raise ValueError(f"{operator}: unknown norm_over {over!r}, wanted head or width")
    if kind == "none":
        return None
    size = heads * head_dim if over == "width" else head_dim
    made = nn.RMSNorm if kind == "rms_norm" else nn.LayerNorm
    return made(size, eps=1e-6 if eps is None else eps, elementwise_affine=affine is not False)


def normalise(x: Tensor, norm: nn.RMSNorm | nn.LayerNorm | None) -> Tensor:
    """x after the norm that `make_norm` made; x: [batch, tokens, heads, head_dim]."""
    if norm is None:
        return x
    if norm.normalized_shape[0] == x.shape[-1]:
        return norm(x)
    return norm(x.flatten(2)).unflatten(-1, x.shape[2:])


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
