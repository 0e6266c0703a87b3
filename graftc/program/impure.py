"""What a captured graph cannot say: numbers drawn at random, and a backward that the user wrote."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from graftc.diagnostics import Diagnostic, Note, fail
from graftc.program.program import ATEN
from graftc.program.traces import calling_line, own_lines

_OFF = {"train": False, "training": False, "p": 0.0, "dropout_p": 0.0}
"""Arguments of an operator that may draw numbers, and the value with which it draws none."""

_DROPOUTS: frozenset[Any] = frozenset({
    ATEN.dropout.default, ATEN.feature_dropout.default, ATEN.native_dropout.default,
    ATEN.alpha_dropout.default, ATEN.scaled_dot_product_attention.default,
})  # fmt: skip
"""Random in train mode only, and written so that the student's own mode decides."""


def draws(node: fx.Node) -> bool:
    """Whether a call of the node's operator, with the arguments it has, draws random numbers.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> [draws(graph.call_function(ATEN.dropout.default, (x, 0.1, train))) for train in (True, False)]
    [True, False]
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for at, argument in enumerate(target._schema.arguments):
        given = node.args[at] if at < len(node.args) else argument.default_value
        if argument.name in _OFF and node.kwargs.get(argument.name, given) == _OFF[argument.name]:
            return False
    return True


def check_random(module: fx.GraphModule, training: bool) -> None:
    """Raise GraftError (G810), with the user's line, for a draw of random numbers that is no dropout of train mode."""
    for _, inner in _graphs(module):
        for node in inner.graph.nodes:
            if not draws(node) or (training and node.target in _DROPOUTS):
                continue
            lines = own_lines(node.meta.get("stack_trace"))
            mode = "train" if training else "eval"
            fail(
                "G810",
                f"forward draws random numbers in {mode} mode (`{node.target.overloadpacket.__name__}`), "
                "so that teacher and student never see the same",
                site="torch.export",
                wanted="outputs that depend on the inputs and the weights alone",
                found=f"{node.target}",
                notes=[Note(line) for line in lines],
                help="call `.eval()` on the model; what training drops or adds at random (label dropout) belongs to "
                "the Task"
                if training
                else "draw the numbers outside and give them to the model as an input",
            )


def _graphs(root: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    return [(p, m) for p, m in root.named_modules() if isinstance(m, fx.GraphModule)]


@contextmanager
def backwards_noted(lost: dict[str, Diagnostic]) -> Generator[None]:
    """Within, a warning (G812) goes into `lost` for each class of `torch.autograd.Function` that is not torch's.

    The graph has the ops of its forward; its backward is not in it, and autograd derives the forward's ops instead.
    """
    function: Any = torch.autograd.Function
    original = vars(function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            line = calling_line()
            lost[cls.__qualname__] = Diagnostic(
                "G812",
                f"the backward of `{cls.__name__}` is not in the captured graph: "
                "the student's gradient is that of the ops of its forward",
                site=cls.__qualname__,
                notes=(Note(line),) if line else (),
                help="where the two differ, say so with ops (`x + (f(x) - x).detach()`), or keep this part out of what is trained",
                severity="warning",
            )
        return original.__func__(cls, *args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


class certain_choices(TorchFunctionMode):
    """Within, `torch.rand([]) < p` is a plain False for p ≤ 0 and True for p ≥ 1, so that `if` needs no value of it.

    transformers' layers are left out so (`layerdrop`), with probability 0 as a rule. And a dropout in place is one of
    its result, which alone can be told.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WITH_INPLACE:
            args, kwargs = args[:3], {k: v for k, v in (kwargs or {}).items() if k != "inplace"}
        if func in _BELOW and len(args) == 2 and any(args[0] is d for d in self._drawn):
            bound = args[1]
            if isinstance(bound, (int, float)) and not 0 < bound < 1:
                return bound >= 1
        made = func(*args, **(kwargs or {}))
        if func is torch.rand and isinstance(made, torch.Tensor) and made.ndim == 0:
            self._drawn.append(made)
        return made


_WITH_INPLACE = frozenset({
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
})  # fmt: skip
_BELOW = frozenset({torch.lt, torch.Tensor.lt, torch.Tensor.__lt__})
