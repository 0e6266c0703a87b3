"""What the operators with heads share: sizes, norms of q and k, rotary positions, masks, softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QKNorm = nn.RMSNorm | nn.LayerNorm | None


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


def one_form(operator: str, form: str, forms: tuple[str, ...]) -> str:
    """The form itself, the first of `forms` for `auto`; ValueError for one that is not among them.

    >>> one_form("sliding_window", "auto", ("blocks", "dense"))
    'blocks'
    """
    if form not in ("auto", *forms):
        raise ValueError(f"{operator}: unknown form {form!r}, wanted auto, {' or '.join(forms)}")
    return forms[0] if form == "auto" else form


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
) -> QKNorm:
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


def normalise(x: Tensor, norm: QKNorm) -> Tensor:
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


def shut(mask: Tensor) -> Tensor:
    """Where a mask hides: False, or, of one that is added, -inf or the lowest number of its dtype.

    >>> shut(torch.tensor([0.0, -1e4, -torch.inf, torch.finfo(torch.float32).min])).tolist()
    [False, False, True, True]
    """
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


def weights(scores: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """Softmax of scores with a mask over the keys that are not hidden; zeros for a query that sees no key.

    So it is in `scaled_dot_product_attention` too. `hidden` holds what `mask` hides.

    >>> hidden = torch.tensor([[False, True], [True, True]])
    >>> weights(torch.zeros(2, 2), hidden, ~hidden).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    if mask.dtype != torch.bool:
        scores = scores + mask
    lowest = torch.finfo(scores.dtype).min  # not -inf, which would make such a row NaN
    scores = scores.clamp(min=lowest / 2).masked_fill(hidden, lowest)
    return scores.softmax(dim=-1).masked_fill(hidden, 0.0)


def four_dimensions(mask: Tensor) -> Tensor:
    """A mask as [batch, heads, queries, keys]: of three it is of all heads, of two of all samples.

    >>> four_dimensions(torch.zeros(2, 1, 5)).shape
    torch.Size([2, 1, 1, 5])
    """
    if mask.ndim == 3:
        return mask.unsqueeze(1)
    return mask.unsqueeze(0).unsqueeze(0) if mask.ndim == 2 else mask


def also_causal(mask: Tensor, tokens: int) -> Tensor:
    """`mask`, and no later token."""
    step = torch.arange(tokens, device=mask.device)
    seen = step.unsqueeze(1) >= step
    if mask.dtype == torch.bool:
        return mask & seen
    lowest = torch.finfo(
        mask.dtype
    ).min  # below what the mask hides: a token that sees nothing reads no later one
    return mask.clamp(min=lowest / 2).masked_fill(~seen, lowest)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(scores / softcap), before any mask (Gemma 2, arXiv 2408.00118); None: the scores.

    >>> capped(torch.tensor([1e9, -1e9]), 50.0).tolist()
    [50.0, -50.0]
    """
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """softmax(capped(scale · q kᵀ) + mask) v; q and the result: [batch, tokens, heads, width].

    k, v: [batch, keys, kv_heads, width], each of their heads serving heads / kv_heads of q's. A mask is
    one that `four_dimensions` takes; a query all of whose keys it hides, by False or -inf, gets zeros, as torch has
    it (where `causal`, and the mask is added: the mean of the keys before it).

    >>> q, k = torch.zeros(1, 3, 4, 2), torch.ones(1, 5, 2, 2)
    >>> attend(q, k, k, 1.0).shape, attend(q, k, k, 1.0).sum().item()
    (torch.Size([1, 3, 4, 2]), 24.0)
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None:
        mask = four_dimensions(mask)
        mask = also_causal(mask, q.shape[2]) if causal else mask
    if softcap is None:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
        return y.transpose(1, 2)
    if causal and mask is None:
        mask = also_causal(torch.ones(1, 1, dtype=torch.bool, device=q.device), q.shape[2])
    scores = capped(scale * (q @ k.transpose(-1, -2)), softcap)
    if mask is None:
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)
    if mask.dtype == torch.bool:
        hidden = ~mask
    else:
        hidden = shut(mask) if causal else mask == float("-inf")
    return (weights(scores, hidden, mask) @ v).transpose(1, 2)


def broadcast_mask(mask: Tensor, batch: int, heads: int, tokens: int) -> Tensor:
    """A mask that is of size 1 in some dimensions as [batch, heads, queries, keys]."""
    return four_dimensions(mask).expand(batch, heads, tokens, tokens)


class HeadMixer(nn.Module):
    """The set-up of an operator with heads: sizes, norms of q and k, rotary positions, factor and cap of the scores.

    `operator` is the name that errors give. What a subclass adds are its maps and how it mixes.

    >>> HeadMixer("attention", 12, 4, kv_heads=2).rows
    24
    """

    def __init__(
        self,
        operator: str,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = head_sizes(operator, dim, heads, kv_heads, head_dim)
        if softcap is not None and softcap <= 0:
            raise ValueError(f"{operator}: softcap is {softcap}, wanted more than 0")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.rotary = check_rotary(operator, rotary)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        norm = (norm_eps, norm_affine)
        self.q_norm = make_norm(operator, qk_norm, norm_over, heads, head_dim, *norm)
        self.k_norm = make_norm(operator, qk_norm, norm_over, kv_heads, head_dim, *norm)

    @property
    def rows(self) -> int:
        """How many features the rows of q, k and v are together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, [batch, tokens, heads, head_dim] each, of their rows side by side; not yet normalised."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = u.split([q, kv, kv], dim=-1)
        return self.by_head(q), self.by_head(k), self.by_head(v)

    def by_head(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads · head_dim] as [batch, tokens, heads, head_dim]."""
        return x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim))

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k after their norms."""
        return normalise(q, self.q_norm), normalise(k, self.k_norm)

    def turned(
        self, q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q and k after their rotary positions."""
        return rotate(q, cos, sin, self.rotary), rotate(k, cos, sin, self.rotary)
