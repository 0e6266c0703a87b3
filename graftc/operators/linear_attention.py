"""Linear attention: a positive feature map in place of softmax; and LoLCATs' hybrid with a window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.heads import (
    HeadMixer,
    broadcast_mask,
    capped,
    four_dimensions,
    hide,
    one_form,
)


class FeatureMap(nn.Module):
    """φ(x) = [softmax(W x), softmax(−W x)], W a matrix of each head; x: [batch, tokens, heads, d].

    `weight` is [heads, d, features], and φ(x) has twice `features`. (Hedgehog, arXiv 2402.04347;
    LoLCATs, arXiv 2410.10254.)

    >>> FeatureMap(heads=2, width=4, features=3)(torch.zeros(1, 5, 2, 4)).shape
    torch.Size([1, 5, 2, 6])
    """

    def __init__(self, heads: int, width: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (6 / self.weight.shape[1]) ** 0.5  # Kaiming's, with a head's width as fan
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        u = (x.transpose(1, 2) @ self.weight.to(x.dtype)).transpose(1, 2)
        return torch.cat((u.softmax(dim=-1), (-u).softmax(dim=-1)), dim=-1)


def causal_sum(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ_{j ≤ i} (q_i · k_j) v_j for every i, in chunks: linear in the tokens.

    q, k: [batch, tokens, heads, d]; v and the result: [batch, tokens, heads, e]. Inside a chunk
    the products are masked; what lies before it comes as one running sum of k_jᵀ v_j.
    """
    batch, tokens, heads, _ = q.shape
    if tokens == 0:
        return v
    # Row r of what follows is one chunk of one head of one sample. Chunks are cut by index, the
    # last one filled up with its last token, which nothing sees: no shape then depends on a
    # remainder, and torch.export takes any batch and length; it needs the two chunks as well.
    chunks: int = torch.sym_max(2, (tokens + chunk - 1) // chunk)  # type: ignore[assignment]
    row = torch.arange(batch * heads * chunks, device=q.device).unsqueeze(1)
    sequence = row // chunks
    block = row - sequence * chunks
    step = torch.arange(chunk, device=q.device)
    position = (block * chunk + step).clamp(max=tokens - 1)
    index = (sequence // heads, position, sequence % heads)
    q, k, v = q[index], k[index], v[index]

    inside = (q @ k.transpose(1, 2)).masked_fill(step > step.unsqueeze(1), 0.0) @ v
    state = (k.transpose(1, 2) @ v).reshape(batch * heads, chunks, k.shape[2], v.shape[2])
    before = F.pad(state.cumsum(dim=1), (0, 0, 0, 0, 1, 0))
    y = inside + q @ before[sequence.squeeze(1), block.squeeze(1)]

    token = torch.arange(tokens, device=q.device).unsqueeze(1)
    first = (torch.arange(batch * heads, device=q.device) * chunks).reshape(batch, 1, heads)
    return y[first + token // chunk, token % chunk]


def weigh_keys(k: Tensor, mask: Tensor | None, operator: str) -> Tensor:
    """φ(k), [batch, tokens, heads, d], times what a mask of keys lets through.

    An additive mask a multiplies a key's weight by exp(a), as it does under softmax.
    """
    if mask is None:
        return k
    if mask.shape[-2] != 1:
        raise ValueError(
            f"{operator}: the mask {list(mask.shape)} differs from query to query;"
            " linear attention takes a mask of keys, [batch, 1, 1, tokens]"
        )
    mask = four_dimensions(mask)
    through = mask.to(k.dtype) if mask.dtype == torch.bool else mask.to(k.dtype).exp()
    return k * through.permute(0, 3, 1, 2)


class FeatureMixer(HeadMixer):
    """An operator with heads and a positive feature map φ of q and of k, learned where it is `softmax_pair`.

    >>> FeatureMixer("linear_attention", 8, 2, feature="relu").phi(torch.tensor([-1.0, 2.0]), None).tolist()
    [0.0, 2.0]
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
        feature: str = "softmax_pair",
        features: int | None = None,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(operator, dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap)
        if feature not in ("elu1", "relu", "softmax_pair"):
            raise ValueError(
                f"{operator}: unknown feature {feature!r}, wanted elu1, relu or softmax_pair"
            )
        self.feature = feature
        learned = feature == "softmax_pair"
        wide = self.head_dim if features is None else features
        self.feature_q = FeatureMap(heads, self.head_dim, wide) if learned else None
        self.feature_k = FeatureMap(self.kv_heads, self.head_dim, wide) if learned else None

    def phi(self, x: Tensor, learned: FeatureMap | None) -> Tensor:
        """φ(x)."""
        if learned is not None:
            return learned(x)
        if self.feature == "relu":
            return F.relu(x)
        if (
            torch.compiler.is_exporting()
        ):  # the same: ONNX Runtime takes longer for Elu than for all of these
            return F.relu(x) + x.clamp(max=0).exp()
        return F.elu(x) + 1


class LinearAttention(FeatureMixer):
    """y_i = out(Σ_j (φ(q_i) · φ(k_j)) v_j / Σ_j φ(q_i) · φ(k_j)); x and y: [batch, tokens, dim].

    φ is elu(x) + 1 (`elu1`, arXiv 2006.16236), relu (Sana, arXiv 2410.10629), or `softmax_pair`:
    [softmax(W x), softmax(−W x)] with a W of each head for q and for k (`feature_q`,
    `feature_k`; Hedgehog, arXiv 2402.04347). The sums run over all tokens, or over j ≤ i where
    `causal`. `in_proj` holds the rows of q, k and v in this order; fewer `kv_heads` are shared by
    groups of query heads. The sums are taken in float32 at least, as half precision overflows at
    some thousand tokens. A mask must be one of keys; cos and sin turn q and k before φ, after
    `qk_norm` (see `Attention`).

    >>> LinearAttention(dim=8, heads=2, feature="relu")(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    forms: tuple[str, ...] = ("products",)

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature: str = "elu1",
        features: int | None = None,
        causal: bool = False,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        form: str = "auto",
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            "linear_attention", dim, heads, kv_heads, head_dim, rotary, *norm,
            feature=feature, features=features,
        )  # fmt: skip
        self.form = one_form("linear_attention", form, self.forms)
        self.causal = causal
        self.eps = 1e-6  # relu may leave a token with nothing to see
        self.in_proj = nn.Linear(dim, self.rows)
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.split(self.in_proj(x))
        q, k = self.turned(*self.normed(q, k), cos, sin)
        return self.out_proj(self.mix(q, k, v, mask).to(x.dtype).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted means, in float32 at least; q, k, v: [batch, tokens, heads, head_dim]."""
        groups = self.heads // self.kv_heads
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (
            self.phi(q.to(wide), self.feature_q),
            self.phi(k.to(wide), self.feature_k),
            v.to(wide),
        )
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        k = weigh_keys(k, mask, "linear_attention")
        # A last column of ones turns into the normaliser, by the same products.
        v = F.pad(v, (0, 1), value=1.0)
        if self.causal:
            y = self.running(q, k, v)
        else:
            state = k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
            y = (q.transpose(1, 2) @ state).transpose(1, 2)
        return y[..., :-1] / (y[..., -1:] + self.eps)

    def running(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Σ_{j ≤ i} (q_i · k_j) v_j; the last column of v is ones; each [batch, tokens, heads, width]."""
        return causal_sum(q, k, v, chunk=64)


class LinearWindowAttention(FeatureMixer):
    """Softmax inside a window, linear attention outside it, one normaliser; [batch, tokens, dim].

    The tokens are cut into blocks of `window`. With s_ij = scale · q_i · k_j and m_i the largest
    s_ij in i's window, w_ij = sigmoid(factor) exp(s_ij − m_i) for j in i's own block or the one
    before it (or, where not `causal`, the one after), and w_ij = φ(q_i) · φ(k_j) elsewhere;
    y_i = out(Σ_j w_ij v_j / Σ_j w_ij), over j ≤ i where `causal`. φ is `softmax_pair`, elu + 1
    (`elu1`) or relu, and `factor` one number a head
    that begins at `start` (a share of 0.1). (LoLCATs, arXiv 2410.10254, with its
    terraced window.) A mask of keys hides or is added; cos and sin turn q and k first,
    after `qk_norm` (see `Attention`, as for `scale` and `softcap`, which the softmax alone has).

    >>> LinearWindowAttention(dim=8, heads=2, window=4)(torch.zeros(1, 50, 8)).shape
    torch.Size([1, 50, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature: str = "softmax_pair",
        features: int | None = None,
        start: float = -2.197,
        causal: bool = False,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            "linear_window_attention", dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap,
            feature, features,
        )  # fmt: skip
        if window < 1:
            raise ValueError(f"linear_window_attention: window is {window}, wanted at least 1")
        self.window = window
        self.causal = causal
        self.eps = 1e-12  # a token whose keys are all masked gives zeros
        self.in_proj = nn.Linear(dim, self.rows)
        self.factor = nn.Parameter(torch.full((heads,), float(start)))
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.split(self.in_proj(x))
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = (t.to(wide) for t in self.normed(q, k))
        q, k = self.turned(q, k, cos, sin)
        y = self.mix(q, k, v.to(wide), mask) if x.shape[1] else q
        return self.out_proj(y.to(x.dtype).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The weighted means; q, k, v: [batch, tokens, heads, head_dim], in float32 at least."""
        batch, tokens, _, _ = q.shape
        groups = self.heads // self.kv_heads
        phi_q, phi_k = self.phi(q, self.feature_q), self.phi(k, self.feature_k)
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        phi_k = weigh_keys(phi_k.repeat_interleave(groups, dim=2), mask, "linear_window_attention")
        v = F.pad(v, (0, 1), value=1.0)  # the last column becomes the normaliser

        # Blocks are cut by index, as in `causal_sum`; the last one is filled up with its last token.
        size = self.window
        blocks: int = torch.sym_max(2, (tokens + size - 1) // size)  # type: ignore[assignment]
        row = torch.arange(batch * self.heads * blocks, device=q.device).unsqueeze(1)
        sequence = row // blocks
        block = row - sequence * blocks
        sample, head = sequence // self.heads, sequence % self.heads
        step = torch.arange(size, device=q.device)
        query = block * size + step
        after = 0 if self.causal else size
        key = block * size + torch.arange(-size, size + after, device=q.device)
        own = (sample, query.clamp(max=tokens - 1), head)
        near = (sample, key.clamp(0, tokens - 1), head)

        seen = ((key >= 0) & (key < tokens)).unsqueeze(1)
        if self.causal:
            seen = seen & (key.unsqueeze(1) <= query.unsqueeze(2))
        lowest = torch.finfo(q.dtype).min
        scores = capped((q[own] * self.scale) @ k[near].transpose(1, 2), self.softcap)
        if mask is not None:
            whole = broadcast_mask(mask, batch, self.heads, tokens)
            rows, columns = query.clamp(max=tokens - 1).unsqueeze(2), near[1].unsqueeze(1)
            scores = hide(scores, whole[sample.unsqueeze(2), head.unsqueeze(2), rows, columns])
        scores = scores.masked_fill(~seen, lowest)
        weight = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        weight = weight.masked_fill(~seen | (scores <= lowest), 0.0)
        share = self.factor.to(q.dtype).sigmoid()[head].unsqueeze(2)
        y = (share * weight) @ v[near]

        # What lies outside: sums over the blocks before the one before, and after the one after.
        valid = (query < tokens).unsqueeze(2)
        state = (phi_k[own] * valid).transpose(1, 2) @ v[own]
        state = state.reshape(batch * self.heads, blocks, state.shape[1], state.shape[2])
        far = F.pad(state.cumsum(dim=1), (0, 0, 0, 0, 2, 0))[sequence.squeeze(1), block.squeeze(1)]
        if not self.causal:
            behind = F.pad(state.flip(1).cumsum(dim=1), (0, 0, 0, 0, 2, 0))
            far = far + behind[sequence.squeeze(1), (blocks - 1 - block).squeeze(1)]
        y = y + phi_q[own] @ far

        token = torch.arange(tokens, device=q.device).unsqueeze(1)
        first = torch.arange(batch * self.heads, device=q.device) * blocks
        y = y[first.reshape(batch, 1, self.heads) + token // size, token % size]
        return y[..., :-1] / (y[..., -1:] + self.eps)
