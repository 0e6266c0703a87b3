"""Attention inside a disc of a grid of tokens, in tiles; alone, or joint with a second stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftc.operators.heads import check_rotary, head_sizes, make_norm, normalise, rotate


def parse_groups(text: str) -> dict[str, str]:
    """`text: full, image: local` as a dict. ValueError where a word is neither.

    >>> parse_groups("text: full, image: local")
    {'text': 'full', 'image': 'local'}
    """
    found: dict[str, str] = {}
    for item in text.split(","):
        name, _, kind = (word.strip() for word in item.partition(":"))
        if not name or kind not in ("full", "local") or name in found:
            raise ValueError(
                f"local_attention_2d: groups {text!r}, wanted NAME: full or NAME: local for each"
            )
        found[name] = kind
    return found


def tiles(
    height: int, width: int, radius: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(queries, keys, seen): the grid cut into tiles, each with the keys that its discs can touch.

    queries: [tiles, n], keys: [tiles, m] are token numbers, a tile at the edge being filled up with
    numbers that repeat; seen: [tiles, n, m] is whether key lies less than `radius` from query.
    """
    side = min(max(4, radius), max(height, width))
    reach = radius - 1
    rows, columns = -(-height // side), -(-width // side)
    tile = torch.arange(rows * columns, device=device).unsqueeze(1)
    top, left = tile // columns * side, tile % columns * side
    own = torch.arange(side * side, device=device)
    y, x = top + own // side, left + own % side
    wide = side + 2 * reach
    around = torch.arange(wide * wide, device=device)
    ky, kx = top - reach + around // wide, left - reach + around % wide
    inside = (ky >= 0) & (ky < height) & (kx >= 0) & (kx < width)
    far = (y.unsqueeze(2) - ky.unsqueeze(1)).square() + (x.unsqueeze(2) - kx.unsqueeze(1)).square()
    queries = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
    keys = ky.clamp(0, height - 1) * width + kx.clamp(0, width - 1)
    return queries, keys, (far < radius * radius) & inside.unsqueeze(1)


def disc_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Tensor, Tensor] | None,
    grid: tuple[int, int],
    radius: int,
    scale: float,
) -> Tensor:
    """Softmax of each token of the grid over its disc, and over all of `others`' keys.

    q, k, v: [batch, heads, height · width, d]; others: the keys and values of the other tokens,
    [batch, heads, n, d].
    """
    height, width = grid
    queries, keys, seen = tiles(height, width, radius, q.device)
    tokens = q.shape[2]
    q = q * scale
    near = k[:, :, keys], v[:, :, keys]  # [batch, heads, tiles, m, d]
    scores = q[:, :, queries] @ near[0].transpose(-1, -2)
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    if others is not None:
        to_others = q[:, :, queries] @ others[0].unsqueeze(2).transpose(-1, -2)
        weight = torch.cat((scores, to_others), dim=-1).softmax(dim=-1)
        count = keys.shape[1]
        y = weight[..., :count] @ near[1] + weight[..., count:] @ others[1].unsqueeze(2)
    else:
        y = scores.softmax(dim=-1) @ near[1]
    # Where each token of the grid stands among the tiles' queries.
    side = min(max(4, radius), max(height, width))
    columns = -(-width // side)
    token = torch.arange(tokens, device=q.device)
    row, column = token // width, token % width
    place = (row // side * columns + column // side) * side * side
    place = place + row % side * side + column % side
    return y.flatten(2, 3)[:, :, place]


def check_grid(tokens: int, height: int, width: int) -> None:
    """ValueError unless there is a token for each place of the grid."""
    if tokens != height * width:
        raise ValueError(
            f"local_attention_2d: {tokens} tokens, built for a grid of {height} x {width}"
        )


def check_disc(height: int, width: int, radius: int) -> None:
    if radius < 1:
        raise ValueError(f"local_attention_2d: radius is {radius}, wanted at least 1")
    if height < 1 or width < 1:
        raise ValueError(f"local_attention_2d: the grid is {height} x {width}")


class LocalAttention2d(nn.Module):
    """Softmax attention of each token to those less than `radius` away on the grid.

    y_i = out(Σ_j softmax_j(scale · q_i · k_j) v_j) over dy² + dx² < radius²; x and y are
    [batch, height · width, dim], row after row. `in_proj` holds the rows of q, k and v in this
    order; fewer `kv_heads` are shared by groups of query heads. Computed in tiles with a halo, so
    that the cost grows linearly with the tokens. (CLEAR, arXiv 2412.16112.)

    >>> LocalAttention2d(dim=8, heads=2, radius=2, height=4, width=6)(torch.zeros(1, 24, 8)).shape
    torch.Size([1, 24, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        radius: int,
        height: int,
        width: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: str = "none",
        qk_norm: str = "none",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = head_sizes("local_attention_2d", dim, heads, kv_heads, head_dim)
        check_disc(height, width, radius)
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.radius = radius
        self.height = height
        self.width = width
        self.rotary = check_rotary("local_attention_2d", rotary)
        self.in_proj = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim)
        self.q_norm = make_norm(
            "local_attention_2d", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine
        )
        self.k_norm = make_norm(
            "local_attention_2d", qk_norm, norm_over, kv_heads, head_dim, norm_eps, norm_affine
        )
        self.scale = head_dim**-0.5 if scale is None else scale
        self.out_proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        check_grid(tokens, self.height, self.width)
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.in_proj(x).split([inner, kv_inner, kv_inner], dim=-1)
        groups = self.heads // self.kv_heads
        q = normalise(q.reshape(batch, tokens, self.heads, self.head_dim), self.q_norm)
        k = normalise(k.reshape(batch, tokens, self.kv_heads, self.head_dim), self.k_norm)
        q, k = rotate(q, cos, sin, self.rotary), rotate(k, cos, sin, self.rotary)
        v = v.reshape(batch, tokens, self.kv_heads, self.head_dim)
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        y = disc_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            (self.height, self.width),
            self.radius,
            self.scale,
        )
        return self.out_proj(y.transpose(1, 2).reshape(batch, tokens, inner))


class JointLocalAttention2d(nn.Module):
    """Two streams in one attention, one of them on a grid and local there: (y1, y2) of (x1, x2).

    x1, x2 and y1, y2 are [batch, tokens, dim]. `streams` names them in this order; `groups` says of
    each whether it is `local` or `full`. A token of a full stream sees all tokens of both; one of
    the local stream, which lies on the grid, sees the tokens of its own stream less than `radius`
    away, and all of the other's. Rows of each `in_proj` are q, k, v; `qk_norm` (see `Attention`, as for
    `scale`) normalises q and k, each stream with weights of its own. With `both = false` only
    the first stream's output is returned. cos and sin are for the tokens in the order that `first`
    says: the stream it names, then the other. (CLEAR, arXiv 2412.16112; joint attention: SD3,
    arXiv 2403.03206.)

    >>> op = JointLocalAttention2d(8, 8, 2, 2, 3, 4, "image, text", "text: full, image: local")
    >>> [tuple(y.shape) for y in op(torch.zeros(1, 12, 8), torch.zeros(1, 5, 8))]
    [(1, 12, 8), (1, 5, 8)]
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        radius: int,
        height: int,
        width: int,
        streams: str,
        groups: str,
        head_dim: int | None = None,
        both: bool = True,
        qk_norm: str = "none",
        rotary: str = "none",
        first: str = "",
        norm_over: str | None = None,
        norm_eps: float | None = None,
        norm_affine: bool | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        _, head_dim = head_sizes("local_attention_2d", dim, heads, None, head_dim)
        check_disc(height, width, radius)
        names = [name.strip() for name in streams.split(",")]
        kinds = parse_groups(groups)
        if len(names) != 2 or set(kinds) != set(names):
            raise ValueError(f"local_attention_2d: groups {groups!r} of the streams {streams!r}")
        if list(kinds.values()).count("local") != 1:
            raise ValueError(f"local_attention_2d: groups {groups!r}, wanted one local stream")
        self.heads = heads
        self.head_dim = head_dim
        self.radius = radius
        self.height = height
        self.width = width
        self.local = [kinds[name] for name in names].index("local")
        self.both = both
        self.rotary = check_rotary("local_attention_2d", rotary)
        self.swapped = first == names[1]
        inner = heads * head_dim
        self.in_proj = nn.Linear(dim, 3 * inner)
        self.in_proj_2 = nn.Linear(context_dim, 3 * inner)
        self.q_norm, self.k_norm, self.q_norm_2, self.k_norm_2 = (
            make_norm(
                "local_attention_2d", qk_norm, norm_over, heads, head_dim, norm_eps, norm_affine
            )
            for _ in range(4)
        )
        self.scale = head_dim**-0.5 if scale is None else scale
        self.out_proj = nn.Linear(inner, dim)
        self.out_proj_2 = nn.Linear(inner, context_dim) if both else None

    def turn(self, q1: Tensor, q2: Tensor, cos: Tensor | None, sin: Tensor | None) -> list[Tensor]:
        """Rotary positions over both streams, in the order in which they were given."""
        if self.rotary == "none":
            return [q1, q2]
        order = (q2, q1) if self.swapped else (q1, q2)
        turned = rotate(torch.cat(order, dim=1), cos, sin, self.rotary)
        found = turned.split([order[0].shape[1], order[1].shape[1]], dim=1)
        return [found[1], found[0]] if self.swapped else [found[0], found[1]]

    def forward(
        self, x: Tensor, context: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        sizes = (3, self.heads, self.head_dim)
        q1, k1, v1 = self.in_proj(x).unflatten(-1, sizes).unbind(2)
        q2, k2, v2 = self.in_proj_2(context).unflatten(-1, sizes).unbind(2)
        q1, k1 = normalise(q1, self.q_norm), normalise(k1, self.k_norm)
        q2, k2 = normalise(q2, self.q_norm_2), normalise(k2, self.k_norm_2)
        q = [t.transpose(1, 2) for t in self.turn(q1, q2, cos, sin)]
        k = [t.transpose(1, 2) for t in self.turn(k1, k2, cos, sin)]
        v = [v1.transpose(1, 2), v2.transpose(1, 2)]
        check_grid(q[self.local].shape[2], self.height, self.width)
        here, there = self.local, 1 - self.local
        y = [v1, v2]
        y[here] = disc_attention(
            q[here],
            k[here],
            v[here],
            (k[there], v[there]),
            (self.height, self.width),
            self.radius,
            self.scale,
        )
        y[there] = F.scaled_dot_product_attention(
            q[there],
            torch.cat((k[0], k[1]), dim=2),
            torch.cat((v[0], v[1]), dim=2),
            scale=self.scale,
        )
        y1, y2 = (t.transpose(1, 2).flatten(2) for t in y)
        if self.out_proj_2 is None:
            return self.out_proj(y1)
        return self.out_proj(y1), self.out_proj_2(y2)
