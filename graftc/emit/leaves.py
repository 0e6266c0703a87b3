"""Modules that need no class of their own: what a person writes as `nn.Linear(64, 256)`.

A captured leaf is recognised by its graph, one operator on its own parameters; a module that an edit
brought in (an operator of graftc, a layer of torch.nn) by its class and arguments. Either way the
result is a constructor's text, and the text decides whether two modules are alike.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import fx, nn

from graftc.diagnostics import fail
from graftc.emit.literals import literal, schema_arguments

ARGUMENTS = "graft_arguments"
"""Attribute of an inserted module: the arguments it was built with, by name."""


def captured_leaf(module: fx.GraphModule) -> str | None:
    """The constructor of a layer of torch.nn that computes what `module` does, None if none is known.

    The layer has the same parameters under the same names, and no buffers.
    """
    nodes = list(module.graph.nodes)
    calls = [n for n in nodes if n.op not in ("placeholder", "get_attr", "output")]
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(calls) != 1 or len(inputs) != 1 or module._buffers or list(module.children()):
        return None
    call = calls[0]
    output = nodes[-1].args[0]
    if output is not call or not isinstance(call.target, torch._ops.OpOverload):
        return None
    reader = _READERS.get(str(call.target).removeprefix("aten."))
    if reader is None:
        return None
    try:
        given = schema_arguments(call)
    except AssertionError:
        return None
    own = {
        k: str(v.target) if isinstance(v, fx.Node) and v.op == "get_attr" else v
        for k, v in given.items()
    }
    stream = own.get("input", own.get("self", own.get("indices")))
    if stream is not inputs[0]:
        return None
    used = {str(n.target) for n in nodes if n.op == "get_attr"}
    if used != set(module._parameters) or any(own.get(n, n) not in (n, None) for n in _PARAMETERS):
        return None
    if not used <= _PARAMETERS or any(
        isinstance(v, fx.Node) and v is not inputs[0] for v in own.values()
    ):
        return None
    made = reader(own, {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None})
    return made if made is not None and _same_state(made, module) else None


_PARAMETERS = frozenset({"weight", "bias"})
Shapes = dict[str, tuple[int, ...]]


def _call(name: str, *args: Any, **kwargs: Any) -> str:
    def none(_: fx.Node) -> ast.expr:
        raise AssertionError

    keywords = [ast.keyword(k, literal(v, none)) for k, v in kwargs.items()]
    return ast.unparse(ast.Call(ast.Name(name), [literal(a, none) for a in args], keywords))


def _linear(given: dict[str, Any], shapes: Shapes) -> str | None:
    if len(shapes.get("weight", ())) != 2:
        return None
    rows, columns = shapes["weight"]
    return _call("nn.Linear", columns, rows, **({} if "bias" in shapes else {"bias": False}))


def _norm_options(given: dict[str, Any], shapes: Shapes, eps: Any) -> dict[str, Any] | None:
    if "bias" in shapes and "weight" not in shapes:
        return None
    options: dict[str, Any] = {} if eps == given["eps"] else {"eps": given["eps"]}
    if "weight" not in shapes:
        options["elementwise_affine"] = False
    return options


def _shape(given: dict[str, Any]) -> Any:
    shape = tuple(given["normalized_shape"])
    return shape[0] if len(shape) == 1 else shape


def _layer_norm(given: dict[str, Any], shapes: Shapes) -> str | None:
    options = _norm_options(given, shapes, 1e-5)
    if options is None:
        return None
    if "weight" in shapes and "bias" not in shapes:
        options["bias"] = False
    return _call("nn.LayerNorm", _shape(given), **options)


def _rms_norm(given: dict[str, Any], shapes: Shapes) -> str | None:
    options = _norm_options(given, shapes, None)
    return None if options is None else _call("nn.RMSNorm", _shape(given), **options)


def _group_norm(given: dict[str, Any], shapes: Shapes) -> str | None:
    if set(shapes) != {"weight", "bias"}:
        return None
    options = {} if given["eps"] == 1e-5 else {"eps": given["eps"]}
    return _call("nn.GroupNorm", given["num_groups"], shapes["weight"][0], **options)


def _embedding(given: dict[str, Any], shapes: Shapes) -> str | None:
    if given["scale_grad_by_freq"] or given["sparse"]:
        return None
    options = {} if given["padding_idx"] < 0 else {"padding_idx": given["padding_idx"]}
    return _call("nn.Embedding", *shapes["weight"], **options)


def _convolution(dims: int) -> Callable[[dict[str, Any], Shapes], str | None]:
    def read(given: dict[str, Any], shapes: Shapes) -> str | None:
        if len(shapes.get("weight", ())) != 2 + dims:
            return None
        out, within, *kernel = shapes["weight"]
        groups = given["groups"]
        options: dict[str, Any] = {"kernel_size": _one(kernel)}
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
            value = _one(given[name])
            if value != default:
                options[name] = value
        if "bias" not in shapes:
            options["bias"] = False
        return _call(f"nn.Conv{dims}d", within * groups, out, **options)

    return read


def _one(value: Any) -> Any:
    """A list of equal numbers as the number."""
    if not isinstance(value, (list, tuple)):
        return value
    values = cast("list[Any]", value)
    return values[0] if len(set(values)) == 1 else tuple(values)


def _activation(name: str, **defaults: Any) -> Callable[[dict[str, Any], Shapes], str | None]:
    def read(given: dict[str, Any], shapes: Shapes) -> str | None:
        options = {k: given[k] for k, v in defaults.items() if given[k] != v}
        return _call(f"nn.{name}", *options.values())

    return read


def _dropout(given: dict[str, Any], shapes: Shapes) -> str | None:
    return _call("nn.Dropout", given["p"]) if given["train"] else "nn.Identity()"


_READERS: dict[str, Callable[[dict[str, Any], Shapes], str | None]] = {
    "linear.default": _linear,
    "layer_norm.default": _layer_norm,
    "rms_norm.default": _rms_norm,
    "group_norm.default": _group_norm,
    "embedding.default": _embedding,
    "conv1d.default": _convolution(1),
    "conv2d.default": _convolution(2),
    "conv3d.default": _convolution(3),
    "conv1d.padding": _convolution(1),
    "conv2d.padding": _convolution(2),
    "silu.default": _activation("SiLU"),
    "gelu.default": _activation("GELU", approximate="none"),
    "relu.default": _activation("ReLU"),
    "sigmoid.default": _activation("Sigmoid"),
    "tanh.default": _activation("Tanh"),
    "mish.default": _activation("Mish"),
    "dropout.default": _dropout,
}


def constructor(module: nn.Module, name: str, site: str) -> str:
    """`Name(dim=64, kernel=4)`: how a module that is no graph is built again.

    Its arguments are those recorded under `graft_arguments`, else the attributes that are named like the
    parameters of `__init__`, as torch.nn's layers have. What they give is compared with the module's
    own parameters. Raises GraftError where they cannot be told.

    >>> constructor(nn.Conv1d(8, 8, 3, padding=1), "nn.Conv1d", "mix")
    'nn.Conv1d(8, 8, 3, padding=1)'
    """
    recorded = getattr(module, ARGUMENTS, None)
    given: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) else {}
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    for parameter in inspect.signature(type(module).__init__).parameters.values():
        key = parameter.name
        if key in ("self", "device", "dtype") or parameter.kind in (
            parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL
        ):  # fmt: skip
            continue
        value = given.get(key, getattr(module, key, parameter.default))
        if isinstance(value, torch.Tensor) or (value is None and key == "bias"):
            value = value is not None  # `bias` holds the parameter, the argument said whether
        if value is parameter.empty:
            _cannot_build(module, site, f"its argument `{key}`")
        if parameter.default is parameter.empty and name.startswith("nn."):
            arguments.append(_one(value))
        elif _one(value) != parameter.default:
            options[key] = _one(value)
    try:
        text = _call(name, *arguments, **options)
    except TypeError as error:
        _cannot_build(module, site, f"its arguments: {error}")
    ours, wanted = _state_on_meta(lambda: type(module)(*arguments, **options)), _state(module)
    if ours != wanted:
        _cannot_build(module, site, "its arguments: those it seems to have give other parameters")
    return text


def _cannot_build(module: nn.Module, site: str, what: str) -> NoReturn:
    fail(
        "G602", f"cannot tell how `{type(module).__name__}` was built: {what}", site=site,
        help=f"keep the arguments of `__init__` as attributes of the same names, or set `{ARGUMENTS}`",
    )  # fmt: skip


def _same_state(text: str, module: nn.Module) -> bool:
    return _state_on_meta(lambda: eval(text, {"nn": nn})) == _state(module)


def _state_on_meta(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"):
            return _state(make())
    except Exception:  # whatever it is, these are not the arguments
        return None


def _state(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in module.state_dict(keep_vars=True).items()}
