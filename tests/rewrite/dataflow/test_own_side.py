"""Each rule on ops matches its own left side, as capture writes it; one that does not is told where and why."""

from __future__ import annotations

import pytest

from graftc.diagnostics import Diagnostic
from graftc.language.check import check
from graftc.rewrite.dataflow.own_side import own_side


def told(match: str, where: str = "", rewrite: str = "y = relu(x)") -> list[Diagnostic]:
    guard = f" where {where}\n" if where else ""
    text = f"rule r {{\n match {{ {match} }}\n{guard} rewrite {{ {rewrite} }}\n}}"
    return list(own_side(check(text).rules[0]))


@pytest.mark.parametrize(
    ("match", "where", "rewrite"),
    [
        ("y = dropout(x) + x", "", "y = x + x"),  # a model captured in training has it
        ("y = to(x, float32) + x", "", "y = x + x"),  # of a half
        ("y = to(x, float32) + x", "dtype(x) == bfloat16", "y = x + x"),
        ('y = einsum("ij,jk,kl->il", x, b, c)', "", "y = matmul(matmul(x, b), c)"),
        ("q, k, v = split(linear(x, w, b), 3, -1)\n y = linear(scaled_dot_product_attention(q, k, v), w2, b2)", "", "y = relu(x)"),
        ("y = embedding(w, x)", "", "y = embedding(w, x) * 2"),
        ("p = masked_fill(x, m, -1e9)\n y = softmax(p, -1)", "", "y = softmax(x, -1)"),
        ("y = reshape(transpose(reshape(x, [b, n, h, d]), 1, 2), [b, h, n, d])", "", "y = relu(x)"),
        ("y = cat([x, rest…], -1)", "", "y = relu(x)"),
        ("y = linear(args…)", "", "y = linear(args…) * 1.5"),
        ("y = relu(not dropout(x))", "", "y = relu(x)"),
        ("y = aten.hardswish(x)", "", "y = relu(x)"),
        ("z = conv2d(x, w, b, stride = 16)\n y = transpose(flatten(z, 2), 1, 2)", "", "y = flatten(z, 2)"),
        ("y = group_norm(x, g, w, b, e) * sigmoid(group_norm(x, g, w, b, e))", "", "y = silu(x)"),
        ("y = batch_norm(conv2d(x, w, b), w2, b2, m, v, false, o, e)", "", "y = conv2d(x, w, b)"),
        ("y = x * x", "shape(x) ~ [b, n, (h d)]", "y = square(x)"),
        ("y = (matmul | bmm)(x, k) * s", "s is number", "y = matmul(x, k)"),
    ],
)  # fmt: skip
def test_what_can_match_itself_is_not_complained_of(match: str, where: str, rewrite: str) -> None:
    assert told(match, where, rewrite) == []


@pytest.mark.parametrize(
    ("match", "where", "rewrite", "span", "found"),
    [
        ("y = relu(x * 1)", "", "y = relu(x)", "x * 1", "`relu(x)`"),
        ("y = relu(x / 1)", "", "y = relu(x)", "x / 1", "`relu(x)`"),
        ("y = exp(dropout(x, 0, false))", "", "y = exp(x)", "dropout(x, 0, false)", "`exp(x)`"),
        ("y = exp(slice(x))", "", "y = exp(x)", "slice(x)", "`exp(x)`"),
        ("y = exp(to(to(x, float32), float32))", "", "y = exp(x)", "to(x, float32)", "`exp(x)`"),
        ("y = 1 / x", "", "y = reciprocal(x)", "1 / x", "`reciprocal(x)`"),
        ("y = x * (2 * 3)", "", "y = x * 6", "(2 * 3)", "`mul(x, 6)`"),
        (
            'y = einsum("bhid,bhjd->bhij", x, k)',
            "",
            "y = matmul(x, k)",
            'einsum("bhid,bhjd->bhij", x, k)',
            "`matmul(x, permute(k, [0, 1, 3, 2]))`",
        ),
        ("y = softmax(x, -1)", "x is number", "y = relu(x)", "x is number", "x is number"),
    ],
)
def test_what_can_never_match_itself(
    match: str, where: str, rewrite: str, span: str, found: str
) -> None:
    (diagnostic,) = told(match, where, rewrite)
    assert (diagnostic.code, diagnostic.severity, diagnostic.found) == ("G443", "error", found)
    assert diagnostic.span is not None
    assert diagnostic.span.text == span
    assert diagnostic.help


def test_a_choice_that_never_matches_beside_one_that_does_is_a_warning() -> None:
    (diagnostic,) = told("y = (relu(x * 1) | relu(x))")
    assert (diagnostic.code, diagnostic.severity) == ("G444", "warning")
    assert diagnostic.span is not None
    assert diagnostic.span.text == "x * 1"


def test_what_could_not_be_tried_says_so() -> None:
    (diagnostic,) = told("y = einsum(e, x, k)", "", "y = relu(x)")
    assert (diagnostic.code, diagnostic.severity) == ("G445", "note")
    assert diagnostic.found


def test_a_bound_site_among_the_ops() -> None:
    text = """rule r {{
        match a = self_attention in blocks odd
        match {{ y = x + {} }}
        rewrite {{ y = x }}
    }}"""
    assert list(own_side(check(text.format("a(h)")).rules[0])) == []
    (diagnostic,) = own_side(check(text.format("a(h) * 1")).rules[0])
    assert diagnostic.found == "`add(x, a(h)(h))`"
