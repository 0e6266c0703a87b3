"""The ops that analysis speaks of, by what they do."""

from __future__ import annotations

from typing import Any

from graftc.program.program import ATEN


def _overloads(*names: str) -> frozenset[Any]:
    """`"view.default"` → the op; a name that this version of torch lacks is left out."""
    found: list[Any] = []
    for name in names:
        op, _, overload = name.partition(".")
        packet = getattr(ATEN, op, None)
        if packet is not None and overload in packet.overloads():
            found.append(getattr(packet, overload))
    return frozenset(found)


LINEARS = frozenset({ATEN.linear.default, ATEN.addmm.default})
CONVS = frozenset({ATEN.conv1d.default, ATEN.conv2d.default, ATEN.conv3d.default})
NORMS = {
    ATEN.layer_norm.default: "layer_norm",
    ATEN.rms_norm.default: "rms_norm",
    ATEN.group_norm.default: "group_norm",
    ATEN.batch_norm.default: "batch_norm",
    ATEN.instance_norm.default: "instance_norm",
}
MOVEMENTS = _overloads(
    "view.default", "reshape.default", "transpose.int", "permute.default", "chunk.default",
    "split.Tensor", "split_with_sizes.default", "unbind.int", "select.int", "slice.Tensor",
    "unsqueeze.default", "squeeze.dim", "contiguous.default", "clone.default",
    "flatten.using_ints", "unflatten.int", "expand.default", "tensor_split.sections", "to.dtype",
    "repeat_interleave.self_int", "movedim.int", "swapaxes.default", "t.default", "repeat.default",
    "type_as.default", "to.dtype_layout", "_to_copy.default", "dropout.default", "narrow.default",
    "squeeze.dims", "split.sizes", "swapdims.default", "view_as_real.default", "view_as_complex.default",
)  # fmt: skip
"""Ops that move values without computing; a dropout or a cast is one here: it changes no structure."""

POINTWISE = _overloads(
    "gelu.default", "silu.default", "relu.default", "tanh.default", "sigmoid.default", "leaky_relu.default",
    "elu.default", "mish.default", "softplus.default", "hardswish.default", "hardtanh.default", "relu6.default",
    "mul.Tensor", "mul.Scalar", "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar",
    "div.Tensor", "div.Scalar", "pow.Tensor_Scalar", "square.default", "exp.default", "erf.default",
    "neg.default", "clamp.default", "clamp_min.default", "clamp_max.default", "to.dtype", "abs.default",
    "minimum.default", "maximum.default", "dropout.default", "relu_.default", "sqrt.default", "log1p.default",
    "selu.default", "celu.default", "softsign.default", "log_sigmoid.default", "threshold.default",
)  # fmt: skip

SDPA = ATEN.scaled_dot_product_attention.default
SOFTMAX = _overloads("softmax.int", "_softmax.default")
MASKINGS = _overloads("masked_fill.Scalar", "masked_fill.Tensor", "where.self", "where.ScalarOther")
SUMS = frozenset({ATEN.add.Tensor, ATEN.sub.Tensor})
PRODUCTS = frozenset({ATEN.matmul.default, ATEN.bmm.default, ATEN.baddbmm.default})
NORM_PARTS = _overloads("rsqrt.default", "linalg_vector_norm.default", "norm.ScalarOpt_dim")
"""What a norm that is written out is known by."""

ACTIVATIONS = _overloads(
    "gelu.default", "silu.default", "relu.default", "tanh.default", "sigmoid.default", "leaky_relu.default",
)  # fmt: skip
"""Ops that an MLP is known by, for saying why something is none; any other formula counts as well."""
