"""Each way of writing an operator gives what the operator gives, to the bit."""

from __future__ import annotations

import ast

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from graftc.emit.expressions import expression
from graftc.emit.table import TEMPLATES

A = torch.ops.aten
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
Y = X * 3
M = X > 0
INDEX = torch.tensor([[0, 1], [3, 2]])
W = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
S = X.flatten(0, 1)
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
KERNEL = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(3))
HEADS = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(4))

CALLS = [
    (A.add.Tensor, (X, Y), {}, "a + b"),
    (A.add.Tensor, (X, Y), {"alpha": 2}, "torch.add(a, b, alpha=2)"),
    (A.add.Tensor, (X, 1), {}, "a + 1"),
    (A.sub.Tensor, (X, -2.5), {}, "a - -2.5"),
    (A.rsub.Scalar, (X, 1), {}, "1 - a"),
    (A.mul.Tensor, (X, 0.1), {}, "a * 0.1"),
    (A.div.Tensor, (X, 3), {}, "a / 3"),
    (A.pow.Tensor_Scalar, (X, 2), {}, "a ** 2"),
    (A.pow.Scalar, (2.0, X), {}, "2.0 ** a"),
    (A.neg.default, (X,), {}, "-a"),
    (A.matmul.default, (X, X.transpose(1, 2)), {}, "a @ b"),
    (A.gt.Scalar, (X, 0), {}, "a > 0"),
    (A.bitwise_not.default, (M,), {}, "~a"),
    (A.view.default, (X, [2, -1]), {}, "a.view(2, -1)"),
    (A.permute.default, (X, [2, 0, 1]), {}, "a.permute(2, 0, 1)"),
    (A.transpose.int, (X, -2, -1), {}, "a.transpose(-2, -1)"),
    (A.flatten.using_ints, (X,), {}, "a.flatten()"),
    (A.flatten.using_ints, (X, 0, 1), {}, "a.flatten(0, 1)"),
    (A.unflatten.int, (X, 1, [2, 2]), {}, "a.unflatten(1, [2, 2])"),
    (A.unsqueeze.default, (X, 1), {}, "a.unsqueeze(1)"),
    (A.expand.default, (X[:, :1], [2, 4, 6]), {}, "a.expand(2, 4, 6)"),
    (A.repeat.default, (X, [1, 2, 1]), {}, "a.repeat(1, 2, 1)"),
    (A.chunk.default, (X, 2, -1), {}, "a.chunk(2, dim=-1)"),
    (A.split.Tensor, (X, 2), {}, "a.split(2)"),
    (A.split_with_sizes.default, (X, [1, 5], -1), {}, "a.split([1, 5], dim=-1)"),
    (A.unbind.int, (X, 1), {}, "a.unbind(1)"),
    (A.softmax.int, (X, -1), {}, "a.softmax(dim=-1)"),
    (A.softmax.int, (X, -1, torch.float64), {}, "a.softmax(dim=-1, dtype=torch.float64)"),
    (A.mean.dim, (X, [-1], True), {}, "a.mean(dim=-1, keepdim=True)"),
    (A.mean.dim, (X, [1, 2]), {}, "a.mean(dim=[1, 2])"),
    (A.sum.dim_IntList, (X, [0]), {}, "a.sum(dim=0)"),
    (A.var.correction, (X, [-1]), {"correction": 0, "keepdim": True}, "a.var(dim=-1, correction=0, keepdim=True)"),
    (A.slice.Tensor, (X, 1, 1, 3), {}, "a[:, 1:3]"),
    (A.slice.Tensor, (X, -1, 2, 2**63 - 1), {}, "a[..., 2:]"),
    (A.select.int, (X, 1, -1), {}, "a[:, -1]"),
    (A.to.dtype, (X, torch.float64), {}, "a.to(torch.float64)"),
    (A.clamp.default, (X, None, 0.5), {}, "a.clamp(max=0.5)"),
    (A.clamp.default, (X, -0.5), {}, "a.clamp(min=-0.5)"),
    (A.masked_fill.Scalar, (X, M, float("-inf")), {}, "a.masked_fill(b, float('-inf'))"),
    (A.repeat_interleave.self_int, (X, 2, 0), {"output_size": 4}, "a.repeat_interleave(2, dim=0, output_size=4)"),
    (A.topk.default, (X, 2), {}, "a.topk(2)"),
    (A.roll.default, (X, [1], [1]), {}, "a.roll([1], [1])"),
    (A.gather.default, (S, 0, INDEX), {}, "a.gather(0, b)"),
    (A.cumsum.default, (X, 1), {}, "a.cumsum(dim=1)"),
    (A.tril.default, (X,), {}, "a.tril()"),
    (A.cat.default, ([X, X], -1), {}, "torch.cat([a, a], dim=-1)"),
    (A.stack.default, ([X, X],), {}, "torch.stack([a, a])"),
    (A.where.self, (M, X, X * 2), {}, "torch.where(a, b, c)"),
    (A.einsum.default, ("bnd,od->bno", [X, W]), {}, "torch.einsum('bnd,od->bno', a, b)"),
    (A.arange.start_step, (1, 9, 2), {}, "torch.arange(1, 9, 2)"),
    (A.arange.start, (0, 9), {"dtype": torch.float32}, "torch.arange(9, dtype=torch.float32)"),
    (A.arange.start, (1, 9), {}, "torch.arange(1, 9)"),
    (A.full.default, ([2, 2], 0.5), {}, "torch.full([2, 2], 0.5)"),
    (A.zeros_like.default, (X,), {}, "torch.zeros_like(a)"),
    (A.linear.default, (X, W), {}, "F.linear(a, b)"),
    (A.layer_norm.default, (X, [6], None, None, 1e-6, False), {}, "F.layer_norm(a, [6], eps=1e-06)"),
    (A.rms_norm.default, (X, [6], X[0, 0], 1e-6), {}, "F.rms_norm(a, [6], b, eps=1e-06)"),
    (A.embedding.default, (W, INDEX), {}, "F.embedding(b, a)"),
    (A.embedding.default, (W, INDEX, 1), {}, "F.embedding(b, a, padding_idx=1)"),
    (A.conv2d.default, (IMAGE, KERNEL, None, [2, 2], [1, 1], [1, 1], 2), {},
     "F.conv2d(a, b, stride=[2, 2], padding=[1, 1], groups=2)"),
    (A.gelu.default, (X,), {"approximate": "tanh"}, "F.gelu(a, approximate='tanh')"),
    (A.silu.default, (X,), {}, "F.silu(a)"),
    (A.glu.default, (X,), {}, "F.glu(a)"),
    (A.pad.default, (X, [0, 0, 1, 0]), {}, "F.pad(a, [0, 0, 1, 0])"),
    (A.pixel_shuffle.default, (IMAGE, 2), {}, "F.pixel_shuffle(a, 2)"),
    (A.scaled_dot_product_attention.default, (HEADS, HEADS * 2, HEADS * 3), {"is_causal": True},
     "F.scaled_dot_product_attention(a, b, c, is_causal=True)"),
    (A.scaled_dot_product_attention.default, (HEADS, HEADS * 2, HEADS * 3, None, 0.0, False), {"scale": 0.5},
     "F.scaled_dot_product_attention(a, b, c, scale=0.5)"),
    (A.dropout.default, (X, 0.3, False), {}, "a"),
    (A.lerp.Scalar, (X, X * 2, 0.5), {}, "torch.ops.aten.lerp.Scalar(a, b, 0.5)"),
    (A.upsample_nearest2d.vec, (IMAGE, None, [2.0, 2.0]), {},
     "torch.ops.aten.upsample_nearest2d.vec(a, None, [2.0, 2.0])"),
]  # fmt: skip


def written_and_run(target, args, kwargs):
    graph = fx.Graph()
    names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def placed(value):
        if isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value):
            return [placed(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in names:
            name = "abcdef"[len(names)]
            names[id(value)] = name
            tensors[name] = value
            made = graph.placeholder(name)
            made.meta["val"] = value
            nodes[name] = made
        return nodes[names[id(value)]]

    nodes: dict[str, fx.Node] = {}
    node = graph.call_function(
        target, tuple(placed(a) for a in args), {k: placed(v) for k, v in kwargs.items()}
    )
    text = ast.unparse(expression(node, lambda n: ast.Name(n.name), "here"))
    return text, eval(text, {"torch": torch, "F": F, **tensors})


@pytest.mark.parametrize(("target", "args", "kwargs", "wanted"), CALLS, ids=[c[3] for c in CALLS])
def test_written_form_computes_the_same(target, args, kwargs, wanted):
    text, found = written_and_run(target, args, kwargs)
    assert text == wanted
    expected = target(*args, **kwargs)
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_every_entry_names_a_real_operator_and_its_arguments():
    for name, template in TEMPLATES.items():
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(A, packet), overload)._schema
        known = {a.name for a in schema.arguments} | {"torch", "F", "MODULE"}
        used = {n.id for n in ast.walk(ast.parse(template)) if isinstance(n, ast.Name)}
        assert used <= known, f"{name}: {used - known}"
