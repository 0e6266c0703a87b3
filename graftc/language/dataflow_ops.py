"""The ops of dataflow patterns: the language's name of each, its parameters, and the ATen ops it stands for.

Written once, as text, so that `check`, the editor and the matcher agree and none of the first two needs
torch. A row is the language's signature and then one line for each ATen overload, whose arguments are named in
the order of the signature (`-` where the overload has none; `=0` where it stands for a constant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["value", "values", "dim", "dims", "sizes", "number", "flag", "word", "list"]


@dataclass(frozen=True)
class OpParameter:
    """A parameter of an op. `kind`: how two arguments compare; what a pattern leaves out is at its `default`.

    The default `any` fits whatever stands there. Kinds: value: a tensor or number; values: a list of tensors; dim, dims: negative ones count from the end;
    number, flag, word; sizes: a number for all dimensions or a list; list: a list of sizes.
    """

    name: str
    kind: Kind
    default: int | float | bool | str | None = None
    required: bool = True


@dataclass(frozen=True)
class AtenForm:
    """An ATen overload (`softmax.int`), and for each parameter its schema's name, None or a constant."""

    target: str
    arguments: tuple[str | int | None, ...]


@dataclass(frozen=True)
class OpWord:
    """An op of the language. `commutes`: two parameters whose order does not matter."""

    name: str
    parameters: tuple[OpParameter, ...]
    forms: tuple[AtenForm, ...]
    commutes: tuple[int, int] | None = None

    @property
    def signature(self) -> str:
        """`softmax(x, dim, dtype = none)`."""
        shown = [
            p.name if p.required else f"{p.name} = {_word(p.default)}" for p in self.parameters
        ]
        return f"{self.name}({', '.join(shown)})"


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


IGNORED = frozenset(
    [
        "cudnn_enable",
        "cudnn_enabled",
        "memory_format",
        "non_blocking",
        "copy",
        "pin_memory",
        "path",
        "implicit",
        "padding_idx",
        "sparse",
        "scale_grad_by_freq",
    ]
)
"""Arguments of ATen ops that do not change a value; any other that a form leaves out must be at its default."""

_TABLE = """
add(x, y) commutes
    add.Tensor self other
    add.Scalar self other
sub(x, y)
    sub.Tensor self other
    sub.Scalar self other
    rsub.Scalar other self
    rsub.Tensor other self
mul(x, y) commutes
    mul.Tensor self other
    mul.Scalar self other
div(x, y, rounding: word = none)
    div.Tensor self other -
    div.Scalar self other -
    div.Tensor_mode self other rounding_mode
neg(x)
    neg.default self
abs(x)
    abs.default self
reciprocal(x)
    reciprocal.default self
exp(x)
    exp.default self
log(x)
    log.default self
sqrt(x)
    sqrt.default self
rsqrt(x)
    rsqrt.default self
square(x)
    square.default self
pow(x, y)
    pow.Tensor_Scalar self exponent
    pow.Tensor_Tensor self exponent
    pow.Scalar self exponent
sin(x)
    sin.default self
cos(x)
    cos.default self
erf(x)
    erf.default self
tanh(x)
    tanh.default self
sigmoid(x)
    sigmoid.default self
relu(x)
    relu.default self
silu(x)
    silu.default self
gelu(x, approximate: word = "none")
    gelu.default self approximate
leaky_relu(x, slope: number = 0.01)
    leaky_relu.default self negative_slope
elu(x, alpha: number = 1.0)
    elu.default self alpha
softplus(x, beta: number = 1, threshold: number = 20)
    softplus.default self beta threshold
softmax(x, dim: dim, dtype: word = none)
    softmax.int self dim dtype
    _softmax.default self dim -
log_softmax(x, dim: dim, dtype: word = none)
    log_softmax.int self dim dtype
dropout(x, p: number = any, train: flag = any)
    dropout.default input p train
maximum(x, y) commutes
    maximum.default self other
minimum(x, y) commutes
    minimum.default self other
clamp(x, min: number = none, max: number = none)
    clamp.default self min max
    clamp_min.default self min -
    clamp_max.default self - max
eq(x, y) commutes
    eq.Tensor self other
    eq.Scalar self other
ne(x, y) commutes
    ne.Tensor self other
    ne.Scalar self other
lt(x, y)
    lt.Tensor self other
    lt.Scalar self other
le(x, y)
    le.Tensor self other
    le.Scalar self other
gt(x, y)
    gt.Tensor self other
    gt.Scalar self other
ge(x, y)
    ge.Tensor self other
    ge.Scalar self other
logical_not(x)
    logical_not.default self
logical_and(x, y) commutes
    logical_and.default self other
logical_or(x, y) commutes
    logical_or.default self other
where(condition, x, y)
    where.self condition self other
    where.ScalarOther condition self other
    where.ScalarSelf condition self other
masked_fill(x, mask, value)
    masked_fill.Scalar self mask value
    masked_fill.Tensor self mask value
matmul(x, y)
    matmul.default self other
bmm(x, y)
    bmm.default self mat2
mm(x, y)
    mm.default self mat2
addmm(b, x, w)
    addmm.default self mat1 mat2
baddbmm(b, x, y, beta: number = 1, alpha: number = 1)
    baddbmm.default self batch1 batch2 beta alpha
linear(x, w, b = none)
    linear.default input weight bias
embedding(w, indices)
    embedding.default weight indices
einsum(equation: word, xs: values)
    einsum.default equation tensors
conv1d(x, w, b = none, stride: sizes = 1, padding: sizes = 0, dilation: sizes = 1, groups: number = 1)
    conv1d.default input weight bias stride padding dilation groups
    conv1d.padding input weight bias stride padding dilation groups
conv2d(x, w, b = none, stride: sizes = 1, padding: sizes = 0, dilation: sizes = 1, groups: number = 1)
    conv2d.default input weight bias stride padding dilation groups
    conv2d.padding input weight bias stride padding dilation groups
conv3d(x, w, b = none, stride: sizes = 1, padding: sizes = 0, dilation: sizes = 1, groups: number = 1)
    conv3d.default input weight bias stride padding dilation groups
layer_norm(x, shape: list, w = none, b = none, eps: number = 1e-5)
    layer_norm.default input normalized_shape weight bias eps
rms_norm(x, shape: list, w = none, eps: number = none)
    rms_norm.default input normalized_shape weight eps
group_norm(x, groups: number, w = none, b = none, eps: number = 1e-5)
    group_norm.default input num_groups weight bias eps
batch_norm(x, w, b, mean, var, train: flag, momentum: number, eps: number)
    batch_norm.default input weight bias running_mean running_var training momentum eps
scaled_dot_product_attention(q, k, v, mask = none, dropout: number = 0.0, causal: flag = false, scale: number = none, gqa: flag = false)
    scaled_dot_product_attention.default query key value attn_mask dropout_p is_causal scale enable_gqa
mean(x, dim: dims = none, keepdim: flag = false, dtype: word = none)
    mean.dim self dim keepdim dtype
    mean.default self - - dtype
sum(x, dim: dims = none, keepdim: flag = false, dtype: word = none)
    sum.dim_IntList self dim keepdim dtype
    sum.default self - - dtype
var(x, dim: dims = none, correction: number = 1, keepdim: flag = false)
    var.correction self dim correction keepdim
    var.dim self dim unbiased keepdim
std(x, dim: dims = none, correction: number = 1, keepdim: flag = false)
    std.correction self dim correction keepdim
    std.dim self dim unbiased keepdim
norm(x, p: number, dim: dims = none, keepdim: flag = false)
    norm.ScalarOpt_dim self p dim keepdim
amax(x, dim: dims = none, keepdim: flag = false)
    amax.default self dim keepdim
cumsum(x, dim: dim, dtype: word = none)
    cumsum.default self dim dtype
reshape(x, shape: list)
    view.default self size
    reshape.default self shape
    _unsafe_view.default self size
flatten(x, start: dim = 0, end: dim = -1)
    flatten.using_ints self start_dim end_dim
unflatten(x, dim: dim, sizes: list)
    unflatten.int self dim sizes
transpose(x, first: dim, second: dim) commutes first second
    transpose.int self dim0 dim1
    t.default self =0 =1
    mT.default self =-2 =-1
    numpy_T.default self =0 =1
permute(x, dims: dims)
    permute.default self dims
expand(x, shape: list)
    expand.default self size
squeeze(x, dim: dims = none)
    squeeze.dim self dim
    squeeze.dims self dim
    squeeze.default self -
unsqueeze(x, dim: dim)
    unsqueeze.default self dim
select(x, dim: dim, index: number)
    select.int self dim index
slice(x, dim: dim = 0, start: number = none, end: number = none, step: number = 1)
    slice.Tensor self dim start end step
split(x, parts: list, dim: dim = -1)
    chunk.default self chunks dim
    split.Tensor self split_size dim
    split_with_sizes.default self split_sizes dim
    split.sizes self split_size dim
unbind(x, dim: dim = 0)
    unbind.int self dim
cat(xs: values, dim: dim = 0)
    cat.default tensors dim
stack(xs: values, dim: dim = 0)
    stack.default tensors dim
repeat(x, times: list)
    repeat.default self repeats
repeat_interleave(x, times: number, dim: dim = none)
    repeat_interleave.self_int self repeats dim
roll(x, shifts: list, dims: dims = none)
    roll.default self shifts dims
flip(x, dims: dims)
    flip.default self dims
tril(x, diagonal: number = 0)
    tril.default self diagonal
triu(x, diagonal: number = 0)
    triu.default self diagonal
pad(x, sizes: list, mode: word = "constant", value: number = none)
    pad.default self pad mode value
clone(x)
    clone.default self
contiguous(x)
    contiguous.default self
to(x, dtype: word)
    to.dtype self dtype
    _to_copy.default self dtype
    to.dtype_layout self dtype
type_as(x, y)
    type_as.default self other
zeros_like(x)
    zeros_like.default self
ones_like(x)
    ones_like.default self
"""

ALIASES: Mapping[str, str] = {
    "view": "reshape",
    "chunk": "split",
    "concat": "cat",
    "concatenate": "cat",
    "swish": "silu",
    "sdpa": "scaled_dot_product_attention",
    "multiply": "mul",
    "divide": "div",
    "subtract": "sub",
}
"""Other names of the same ops."""

SYMBOLS: Mapping[str, str] = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
"""Operators of expressions."""

NO_OPS: Mapping[str, str] = {"detach": "detach", "alias": "alias"}
"""What normalisation takes out of every model: a pattern of it would never match."""


def _constant(text: str) -> int | float | bool | str | None:
    words: Mapping[str, bool | str | None] = {
        "none": None, "true": True, "false": False, "any": "any",
    }  # fmt: skip
    if text in words:
        return words[text]
    if text.startswith('"'):
        return text.strip('"')
    return float(text) if "." in text or "e" in text else int(text)


def _parameter(text: str) -> OpParameter:
    head, equal, default = (part.strip() for part in text.partition("="))
    name, _, kind = (part.strip() for part in head.partition(":"))
    return OpParameter(name, kind or "value", _constant(default) if equal else None, not equal)  # type: ignore[arg-type]


def _form(line: str) -> AtenForm:
    target, *arguments = line.split()
    return AtenForm(
        target,
        tuple(None if a == "-" else int(a[1:]) if a.startswith("=") else a for a in arguments),
    )


def _read(table: str) -> dict[str, OpWord]:
    ops: dict[str, OpWord] = {}
    for line in table.strip().splitlines():
        if line.startswith(" "):
            name, word = next(reversed(ops.items()))
            ops[name] = OpWord(name, word.parameters, (*word.forms, _form(line)), word.commutes)
            continue
        name, _, rest = line.partition("(")
        inside, _, words = rest.rpartition(")")
        parameters = tuple(_parameter(p) for p in inside.split(","))
        commutes: tuple[int, int] | None = None
        if words.strip():
            _, *which = words.split()
            names = [p.name for p in parameters]
            commutes = (names.index(which[0]), names.index(which[1])) if which else (0, 1)
        ops[name] = OpWord(name, parameters, (), commutes)
    return ops


OPS: Mapping[str, OpWord] = _read(_TABLE)
"""Every op by its name in the language."""


def op_word(name: str) -> OpWord | None:
    """The op of this name or alias.

    >>> op_word("view").signature, op_word("softmax").commutes, op_word("add").commutes
    ('reshape(x, shape)', None, (0, 1))
    """
    return OPS.get(ALIASES.get(name, name))
