"""Attention inside a disc of a grid of tokens, in tiles; alone, beside other tokens, or joint with a second stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftc.operators.heads import (
    HeadMixer,
    attend,
    capped,
    four_dimensions,
    make_norm,
    normalise,
    one_form,
    shut,
    weights,
)


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
    softcap: float | None,
    masks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Softmax of each token of the grid over its disc, and over all of `others`' keys.

    q (scaled), k, v: [batch, heads, height · width, d]; others: the keys and values of the other tokens,
    [batch, heads, n, d]; masks: of the grid's keys and of the others', [1 or batch, 1 or heads, height · width, keys].
    """
    height, width = grid
    queries, keys, seen = tiles(height, width, radius, q.device)
    tokens = q.shape[2]
    own = q[:, :, queries]  # [batch, heads, tiles, n, d]
    scores = capped(own @ k[:, :, keys].transpose(-1, -2), softcap)
    mask = None if masks is None else masks[0][:, :, queries.unsqueeze(2), keys.unsqueeze(1)]
    hidden = ~seen if mask is None else ~seen | shut(mask)
    if mask is None:
        scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    if others is not None:
        far = capped(own @ others[0].unsqueeze(2).transpose(-1, -2), softcap)
        scores = torch.cat((scores, far), dim=-1)
        if mask is not None and masks is not None:
            beside = masks[1][:, :, queries]
            hidden = torch.cat((hidden, shut(beside)), dim=-1)
            mask = torch.cat((mask, beside), dim=-1)
    weight = scores.softmax(dim=-1) if mask is None else weights(scores, hidden, mask)
    count = keys.shape[1]
    y = weight[..., :count] @ v[:, :, keys]
    if others is not None:
        y = y + weight[..., count:] @ others[1].unsqueeze(2)
    # Where each token of the grid stands among the tiles' queries.
    side = min(max(4, radius), max(height, width))
    columns = -(-width // side)
    token = torch.arange(tokens, device=q.device)
    row, column = token // width, token % width
    place = (row // side * columns + column // side) * side * side
    place = place + row % side * side + column % side
    return y.flatten(2, 3)[:, :, place]


class DiscMixer(HeadMixer):
    """Attention inside discs of a grid, and of and to all tokens that are not on the grid."""

    forms: tuple[str, ...] = ("tiles",)

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None,
        head_dim: int | None,
        rotary: str,
        qk_norm: str,
        norm_over: str | None,
        norm_eps: float | None,
        norm_affine: bool | None,
        scale: float | None,
        softcap: float | None,
        radius: int,
        height: int,
        width: int,
        form: str,
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            "local_attention_2d", dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap
        )
        if radius < 1:
            raise ValueError(f"local_attention_2d: radius is {radius}, wanted at least 1")
        if height < 1 or width < 1:
            raise ValueError(f"local_attention_2d: the grid is {height} x {width}")
        self.form = one_form("local_attention_2d", form, self.forms)
        self.radius = radius
        self.height = height
        self.width = width

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: bool) -> Tensor:
        """The weighted means; q, k, v: [batch, tokens, heads, head_dim]; `first`: the grid's tokens come first."""
        tokens, groups = q.shape[1], self.heads // self.kv_heads
        grid = self.height * self.width
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        sizes = [grid, tokens - grid] if first else [tokens - grid, grid]
        here, there = (0, 1) if first else (1, 0)
        queries = (q * self.scale).transpose(1, 2).split(sizes, dim=2)
        keys = k.transpose(1, 2).split(sizes, dim=2)
        values = v.transpose(1, 2).split(sizes, dim=2)
        masks = others = None
        if mask is not None:
            rows = four_dimensions(mask).expand(-1, -1, tokens, tokens).split(sizes, dim=2)
            own = rows[here].split(sizes, dim=3)
            masks, others = (own[here], own[there]), rows[there]
        local = disc_attention(
            queries[here],
            keys[here],
            values[here],
            None if tokens == grid else (keys[there], values[there]),
            (self.height, self.width),
            self.radius,
            self.softcap,
            masks,
        ).transpose(1, 2)
        if tokens == grid:
            return local
        full = q.split(sizes, dim=1)[there]
        if others is None:
            full = attend(full, k, v, self.scale, softcap=self.softcap)
        else:
            hidden = shut(others)
            # The lowest number, not -inf, of which an exported softmax makes NaN.
            lowest = torch.finfo(q.dtype).min
            boolean = others.dtype == torch.bool
            added = torch.zeros_like(others, dtype=q.dtype) if boolean else others
            added = added.masked_fill(hidden, lowest)
            full = attend(full, k, v, self.scale, added, softcap=self.softcap)
            full = full.masked_fill(hidden.all(dim=-1).transpose(1, 2).unsqueeze(-1), 0.0)
        return torch.cat((local, full) if first else (full, local), dim=1)


class LocalAttention2d(DiscMixer):
    """Softmax attention of each token to those less than `radius` away on the grid.

    y_i = out(Σ_j softmax_j(scale · q_i · k_j) v_j) over dy² + dx² < radius²; x and y are
    [batch, height · width, dim], row after row. `in_proj` holds the rows of q, k and v in this
    order; fewer `kv_heads` are shared by groups of query heads. Computed in tiles with a halo, so
    that the cost grows linearly with the tokens. (CLEAR, arXiv 2412.16112.)

    `groups`, `text: full, image: local`, says that other tokens stand before the grid's (or after, where they
    are named last), as many as there are: they see all tokens, and all see them. A mask is added to the
    scores, or hides where it is False; a token all of whose keys it hides gets y = out(0). `rotary`, `qk_norm`,
    `scale` and `softcap` are those of `Attention`.

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
        softcap: float | None = None,
        groups: str | None = None,
        form: str = "auto",
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap, radius, height, width,
            form,
        )  # fmt: skip
        kinds = ["local"] if groups is None else list(parse_groups(groups).values())
        if sorted(kinds) not in (["local"], ["full", "local"]):
            raise ValueError(
                f"local_attention_2d: groups {groups!r}, wanted one local group and one full one"
            )
        self.groups = groups
        self.grid_first = kinds[0] == "local"
        self.alone = len(kinds) == 1
        self.in_proj = nn.Linear(dim, self.rows)
        self.out_proj = nn.Linear(heads * self.head_dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        check_grid(x.shape[1], self.height, self.width, others=not self.alone)
        q, k, v = self.split(self.in_proj(x))
        q, k = self.turned(*self.normed(q, k), cos, sin)
        return self.out_proj(self.mix(q, k, v, mask, self.grid_first).flatten(2))


def check_grid(tokens: int, height: int, width: int, others: bool) -> None:
    """ValueError unless there is a token for each place of the grid, and more where there are `others`."""
    grid = height * width
    if (tokens <= grid) if others else (tokens != grid):
        more = " and more" if others else ""
        raise ValueError(
            f"local_attention_2d: {tokens} tokens, built for a grid of {height} x {width}{more}"
        )


class JointLocalAttention2d(DiscMixer):
    """Two streams in one attention, one of them on a grid and local there: (y1, y2) of (x1, x2).

    x1, x2 and y1, y2 are [batch, tokens, dim]. `streams` names them in this order; `groups` says of
    each whether it is `local` or `full`. A token of a full stream sees all tokens of both; one of
    the local stream, which lies on the grid, sees the tokens of its own stream less than `radius`
    away, and all of the other's. Rows of each `in_proj` are q, k, v; `qk_norm` (see `Attention`, as for
    `scale` and `softcap`) normalises q and k, each stream with weights of its own. With `both = false` only
    the first stream's output is returned. The mask, cos and sin are for the tokens in the order that `first`
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
        softcap: float | None = None,
        kv_heads: int | None = None,
        form: str = "auto",
    ) -> None:
        norm = (qk_norm, norm_over, norm_eps, norm_affine)
        super().__init__(
            dim, heads, kv_heads, head_dim, rotary, *norm, scale, softcap, radius, height, width,
            form,
        )  # fmt: skip
        names = [name.strip() for name in streams.split(",")]
        kinds = parse_groups(groups)
        if len(names) != 2 or set(kinds) != set(names):
            raise ValueError(f"local_attention_2d: groups {groups!r} of the streams {streams!r}")
        if list(kinds.values()).count("local") != 1:
            raise ValueError(f"local_attention_2d: groups {groups!r}, wanted one local stream")
        self.local = [kinds[name] for name in names].index("local")
        self.both = both
        self.swapped = first == names[1]
        inner = heads * self.head_dim
        self.in_proj = nn.Linear(dim, self.rows)
        self.in_proj_2 = nn.Linear(context_dim, self.rows)
        name, size = "local_attention_2d", (self.head_dim, norm_eps, norm_affine)
        self.q_norm_2 = make_norm(name, qk_norm, norm_over, heads, *size)
        self.k_norm_2 = make_norm(name, qk_norm, norm_over, self.kv_heads, *size)
        self.out_proj = nn.Linear(inner, dim)
        self.out_proj_2 = nn.Linear(inner, context_dim) if both else None

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        local = (x, context)[self.local]
        check_grid(local.shape[1], self.height, self.width, others=False)
        q1, k1, v1 = self.split(self.in_proj(x))
        q2, k2, v2 = self.split(self.in_proj_2(context))
        own = [*self.normed(q1, k1), v1]
        other = [normalise(q2, self.q_norm_2), normalise(k2, self.k_norm_2), v2]
        begin, end = (other, own) if self.swapped else (own, other)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(begin, end, strict=True))
        q, k = self.turned(q, k, cos, sin)
        y = self.mix(q, k, v, mask, (self.local == 0) != self.swapped).flatten(2)
        y1, y2 = y.split([begin[0].shape[1], end[0].shape[1]], dim=1)
        y1, y2 = (y2, y1) if self.swapped else (y1, y2)
        if self.out_proj_2 is None:
            return self.out_proj(y1)
        return self.out_proj(y1), self.out_proj_2(y2)
