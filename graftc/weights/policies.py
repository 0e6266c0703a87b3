"""The init policies: small pure functions from the teacher's maps to first weights.

Every function takes and gives `Affine` maps in nn.Linear layout (weight [out, in], bias [out] or
None for zeros), and never changes its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graftc.weights.parts import Affine, SiteParts


def copy(source: Affine) -> Affine:
    """The map itself, in new memory.

    >>> copy(Affine(torch.ones(1, 2))).weight
    tensor([[1., 1.]])
    """
    return Affine(source.weight.clone(), None if source.bias is None else source.bias.clone())


def bias_of(source: Affine) -> Tensor:
    """The bias, zeros where there is none."""
    if source.bias is None:
        return source.weight.new_zeros(source.weight.shape[0])
    return source.bias


def concat(sources: Sequence[Affine]) -> Affine:
    """The maps' outputs one after the other: their rows stacked.

    >>> concat([Affine(torch.ones(1, 2)), Affine(torch.zeros(2, 2), torch.ones(2))]).bias
    tensor([0., 1., 1.])
    """
    weight = torch.cat([s.weight for s in sources])
    if all(s.bias is None for s in sources):
        return Affine(weight)
    return Affine(weight, torch.cat([bias_of(s) for s in sources]))


def rows(source: Affine, start: int, stop: int) -> Affine:
    """The outputs `start` to `stop`, end excluded.

    >>> rows(Affine(torch.eye(3)), 1, 2).weight
    tensor([[0., 1., 0.]])
    """
    bias = None if source.bias is None else source.bias[start:stop]
    return Affine(source.weight[start:stop], bias)


def columns(source: Affine, start: int, stop: int) -> Affine:
    """The inputs `start` to `stop`, end excluded.

    >>> columns(Affine(torch.eye(2)), 1, 2).weight
    tensor([[0.],
            [1.]])
    """
    return Affine(source.weight[:, start:stop], source.bias)


def permute(source: Affine, order: Tensor) -> Affine:
    """The outputs in another order.

    >>> permute(Affine(torch.eye(2)), torch.tensor([1, 0])).weight
    tensor([[0., 1.],
            [1., 0.]])
    """
    bias = None if source.bias is None else source.bias[order]
    return Affine(source.weight[order], bias)


def mean_pool(source: Affine, heads: int, groups: int) -> Affine:
    """`heads` heads averaged in `groups` runs (GQA, arXiv 2305.13245, section 2.1).

    >>> mean_pool(Affine(torch.tensor([[1.], [3.]])), heads=2, groups=1).weight
    tensor([[2.]])
    """
    if groups < 1 or heads % groups:
        raise ValueError(f"mean_pool: {heads} heads do not divide into {groups} groups")
    weight, bias = source.weight, source.bias
    head_dim = weight.shape[0] // heads
    pooled = weight.reshape(groups, heads // groups, head_dim, weight.shape[1]).mean(1)
    if bias is not None:
        bias = bias.reshape(groups, heads // groups, head_dim).mean(1).reshape(-1)
    return Affine(pooled.reshape(groups * head_dim, weight.shape[1]), bias)


def repeat(source: Affine, heads: int, times: int) -> Affine:
    """Each of `heads` heads `times` times in a row: what undoes a grouping of key-value heads.

    >>> repeat(Affine(torch.tensor([[1.], [2.]])), heads=2, times=2).weight.flatten()
    tensor([1., 1., 2., 2.])
    """
    weight, bias = source.weight, source.bias
    head_dim = weight.shape[0] // heads
    spread = weight.reshape(heads, head_dim, weight.shape[1]).repeat_interleave(times, dim=0)
    if bias is not None:
        bias = bias.reshape(heads, head_dim).repeat_interleave(times, dim=0).reshape(-1)
    return Affine(spread.reshape(-1, weight.shape[1]), bias)


def product(outer: Affine, inner: Affine) -> Affine:
    """outer ∘ inner as one map (Puzzle, arXiv 2411.19146: attention → Linear(W_o W_v)).

    >>> product(Affine(torch.full((1, 1), 2.)), Affine(torch.full((1, 1), 3.))).weight
    tensor([[6.]])
    """
    weight = outer.weight @ inner.weight
    if outer.bias is None and inner.bias is None:
        return Affine(weight)
    return Affine(weight, outer.weight @ bias_of(inner) + bias_of(outer))


def identity(outputs: int, inputs: int) -> Affine:
    """The identity; a rectangle has ones on its diagonal.

    >>> identity(1, 2).weight
    tensor([[1., 0.]])
    """
    return Affine(torch.eye(outputs, inputs), torch.zeros(outputs))


def zero(like: Affine) -> Affine:
    """A map of this shape that gives 0.

    >>> zero(Affine(torch.ones(1, 2))).weight
    tensor([[0., 0.]])
    """
    bias = None if like.bias is None else torch.zeros_like(like.bias)
    return Affine(torch.zeros_like(like.weight), bias)


def one(like: Affine) -> Affine:
    """A map of this shape that gives 1, whatever it reads: a gate that lets all through.

    >>> one(Affine(torch.ones(1, 2))).bias
    tensor([1.])
    """
    return Affine(torch.zeros_like(like.weight), like.weight.new_ones(like.weight.shape[0]))


def dirac(channels: int, taps: int, causal: bool) -> Affine:
    """A depthwise filter that passes its input: the last tap, or the middle one where centred.

    >>> dirac(1, 4, causal=True).weight
    tensor([[[0., 0., 0., 1.]]])
    """
    weight = torch.zeros(channels, 1, taps)
    weight[:, :, taps - 1 if causal else (taps - 1) // 2] = 1
    return Affine(weight, torch.zeros(channels))


def dirac2d(channels: int, kernel: int) -> Affine:
    """Filters over a grid that give their input back: one at the centre tap.

    >>> dirac2d(1, 2).weight.flatten().tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    weight = torch.zeros(channels, 1, kernel, kernel)
    centre = (kernel - 1) // 2
    weight[:, :, centre, centre] = 1
    return Affine(weight, torch.zeros(channels))


def branch_merge(dim: int, branches: int, share: float) -> Affine:
    """`share` · Σ of concatenated branches: [share · I, share · I, …].

    >>> branch_merge(1, 2, share=0.5).weight
    tensor([[0.5000, 0.5000]])
    """
    return Affine((share * torch.eye(dim)).repeat(1, branches), torch.zeros(dim))


def magnitude(mlp: SiteParts) -> Tensor:
    """A score for each neuron: the product of the norms of its weights in up, gate and down.

    >>> parts = {"up": Affine(torch.tensor([[1.], [2.]])), "down": Affine(torch.ones(1, 2))}
    >>> magnitude(parts)
    tensor([1., 2.])
    """
    score = mlp["up"].weight.norm(dim=1) * mlp["down"].weight.norm(dim=0)
    return score * mlp["gate"].weight.norm(dim=1) if "gate" in mlp else score


def activation_score(energy: Tensor, down: Affine) -> Tensor:
    """A score for each neuron: the root of its mean squared activation, times the norm of its column in down.

    energy: [neurons]. What a neuron adds to the output, on average, were it alone (as Wanda weighs a
    weight by its input's norm, arXiv 2306.11695).

    >>> activation_score(torch.tensor([4., 1.]), Affine(torch.tensor([[1., 3.]])))
    tensor([2., 3.])
    """
    return energy.sqrt() * down.weight.to(energy).norm(dim=0)


def keep_top(mlp: SiteParts, count: int, scores: Tensor) -> dict[str, Affine]:
    """The `count` neurons of highest score, in their old order: one choice for all the maps.

    >>> parts = {"up": Affine(torch.tensor([[1.], [2.]])), "down": Affine(torch.ones(1, 2))}
    >>> keep_top(parts, 1, magnitude(parts))["up"].weight
    tensor([[2.]])
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"keep_top: {count} neurons wanted, the site has {len(scores)}")
    kept = scores.topk(count).indices.sort().values
    chosen = {n: permute(m, kept) for n, m in mlp.items() if n in ("up", "gate")}
    return {**chosen, "down": Affine(mlp["down"].weight[:, kept], mlp["down"].bias)}


def widen(mlp: SiteParts, fresh: Mapping[str, Affine]) -> dict[str, Affine]:
    """The neurons of `mlp`, then those of `fresh` beyond them with zero columns in down: exact.

    fresh: maps of the new width, whose last rows are used.

    >>> old = {"up": Affine(torch.ones(1, 1)), "down": Affine(torch.ones(1, 1))}
    >>> new = {"up": Affine(torch.full((2, 1), 5.)), "down": Affine(torch.zeros(1, 2))}
    >>> widen(old, new)["up"].weight.flatten(), widen(old, new)["down"].weight
    (tensor([1., 5.]), tensor([[1., 0.]]))
    """
    down = mlp["down"]
    have, want = down.weight.shape[1], fresh["up"].weight.shape[0]
    grown = {
        name: concat([source, rows(fresh[name], have, want)])
        for name, source in mlp.items()
        if name in ("up", "gate")
    }
    columns = down.weight.new_zeros(down.weight.shape[0], want - have)
    return {**grown, "down": Affine(torch.cat([down.weight, columns], dim=1), down.bias)}


def svd(source: Affine, rank: int) -> tuple[Affine, Affine]:
    """The best product of `rank`: (inner [rank, in], outer [out, rank] with the bias).

    >>> inner, outer = svd(Affine(torch.ones(2, 2)), rank=1)
    >>> torch.allclose(product(outer, inner).weight, torch.ones(2, 2))
    True
    """
    u, s, vh = torch.linalg.svd(source.weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    inner, outer = root.unsqueeze(1) * vh[:rank], u[:, :rank] * root
    dtype = source.weight.dtype
    return Affine(inner.to(dtype)), Affine(outer.to(dtype), source.bias)


def whitened_svd(source: Affine, gram: Tensor, rank: int) -> tuple[Affine, Affine]:
    """The product of `rank` that is best on inputs of Gram matrix `gram` [in, in] (SVD-LLM).

    gram = S Sᵀ; the SVD is of W S, and S⁻¹ goes back into the inner map.

    >>> inner, outer = whitened_svd(Affine(torch.ones(2, 2)), torch.eye(2), rank=1)
    >>> torch.allclose(product(outer, inner).weight, torch.ones(2, 2))
    True
    """
    gram = gram.double()
    # Inputs that never vary leave the Gram matrix singular: a trace of ridge makes it a square.
    ridge = 1e-10 * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)
    root = torch.linalg.cholesky(gram + ridge.to(gram.device))
    inner, outer = svd(Affine(source.weight.double() @ root), rank)
    inner_weight = torch.linalg.solve_triangular(root, inner.weight, upper=False, left=False)
    dtype = source.weight.dtype
    return Affine(inner_weight.to(dtype)), Affine(outer.weight.to(dtype), source.bias)
