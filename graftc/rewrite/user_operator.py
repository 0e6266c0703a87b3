"""An operator of a Python file at a site: what graftc's own specs state is measured here.

The class is built with its arguments and run: its parameters, FLOPs (by tracing), whether it mixes
tokens and whether it looks at later ones, and whether it takes other token counts than the site's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.language.rules import OperatorCall
from graftc.operators.spec import Apply, Arguments, Cost, OperatorSpec, Slot, Value
from graftc.program.analysis import Analysis, Site
from graftc.program.capture import capture
from graftc.program.cost import op_flops
from graftc.program.flat import flatten
from graftc.program.model import Model, user_error
from graftc.program.ops import CONVS, LINEARS
from graftc.program.program import size_hint
from graftc.rewrite.user_files import unread

_BATCH = 3
_FEW_TOKENS = 64
"""Tokens of the trial run that tells causality, where the operator takes that many: the site may have 16k."""
_LEAK = 1e-4
"""A change of later tokens that moves earlier outputs by more than this share is no rounding."""


def spec_at(
    call: OperatorCall,
    arguments: Arguments,
    site: Site,
    analysis: Analysis,
    passes: Collection[str] = (),
) -> OperatorSpec:
    """The call's spec; of a Python file's class, as it is at this site.

    `passes`: what of `mask` and `rotary` the site's call can give it; the class has what its forward takes by name.
    Raises GraftError: G433 where the class cannot be built or run on the site's [batch, tokens, dim] or returns
    another shape, with the user's own line; G434 where the site's call has inputs that it would drop; G558 where its
    forward wants an input that it is not given here.
    """
    spec = call.spec
    if spec.user is None:
        return spec
    unread(spec, call.span)
    shape = _stream(site, analysis, call)
    takes = _takes(call, site, passes)
    given = _given(takes, site, analysis)
    found = _measured(spec.user.found, tuple(arguments.items()), shape, given)
    if isinstance(found, GraftError):
        raise GraftError(*(replace(d, span=call.span, site=site.path) for d in found.diagnostics))
    keeps = (*(("causal",) if found.causal and found.mixes else ()), *takes)
    return replace(
        spec,
        mixes="tokens" if found.mixes else "channels",
        keeps=keeps,
        slots=found.slots,
        inits={site.role: {s.name: Apply("random") for s in found.slots}},
        cost=lambda arguments, tokens: found.cost,
        length="free" if found.any_length else "fixed",
    )


@dataclass(frozen=True)
class _Found:
    cost: Cost
    slots: tuple[Slot, ...]
    mixes: bool
    causal: bool
    any_length: bool


def _stream(site: Site, analysis: Analysis, call: OperatorCall) -> tuple[int, ...]:
    """[tokens, dim] of what the site reads."""
    args = analysis.flat.first_calls[site.path].args
    tensor = getattr(args[site.stream], "tensor", None)
    shape = () if tensor is None else tuple(size_hint(s) for s in tensor.shape)
    if len(shape) != 3:
        fail(
            "G433",
            f"`{call.spec.name}` cannot stand at {site.path}, which reads no tokens",
            span=call.span,
            site=site.path,
            wanted="[batch, tokens, dim]",
            found=str(list(shape)),
        )
    others = [a for i, a in enumerate(args) if i != site.stream and hasattr(a, "tensor")]
    if others and site.role not in ("self_attention", "block"):
        fail(
            "G434",
            f"`{call.spec.name}` would drop what else {site.path} reads",
            span=call.span,
            site=site.path,
            wanted="a site whose only input is its token stream",
            found=f"{len(others) + 1} tensors",
        )
    return shape[1:]


INPUTS: Mapping[str, tuple[str, ...]] = {"mask": ("mask",), "rotary": ("cos", "sin")}
"""What a site can have beside its stream, and the names under which a class's forward takes it."""

_Given = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""Name, shape and dtype of each input beside the stream."""


def _takes(call: OperatorCall, site: Site, passes: Collection[str]) -> tuple[str, ...]:
    """Which of the site's inputs the forward takes. Raises GraftError (G558) where it needs what is not there."""
    user = call.spec.user
    assert user is not None
    assert isinstance(user.found, type)
    others = list(inspect.signature(getattr(user.found, "forward")).parameters.values())[1:]  # noqa: B009
    names = {p.name: p for p in others[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes = tuple(
        what
        for what, known in INPUTS.items()
        if what in passes and what in site.kept and all(n in names for n in known)
    )
    given = {n for what in takes for n in INPUTS[what]}
    for name, parameter in names.items():
        if name not in given and parameter.default is parameter.empty:
            fail(
                "G558",
                f"the forward of `{call.spec.name}` needs `{name}`, which {site.path} does not give it",
                span=call.span,
                site=site.path,
                wanted=f"forward({', '.join(['self', 'x', *sorted(given)])})",
                found=f"{name}: no default",
                help="graftc passes `mask`, and `cos` with `sin`, where the site's call has them; "
                f"give `{name}` a default",
            )
    return takes


def _given(takes: Sequence[str], site: Site, analysis: Analysis) -> _Given:
    args = analysis.flat.first_calls[site.path].args
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for what in takes:
        for name, place in zip(INPUTS[what], site.kept[what].arguments, strict=True):
            tensor = args[place].tensor
            found.append((name, tuple(size_hint(s) for s in tensor.shape), tensor.dtype))
    return tuple(found)


def _inputs(given: _Given, tokens: int, count: int) -> dict[str, Tensor]:
    """Inputs that leave a token as it is and let it see all: for `count` tokens in place of the site's."""
    made: dict[str, Tensor] = {}
    for name, shape, dtype in given:
        batch = shape[:1] if shape[0] == 1 else (_BATCH,)
        sizes = (*batch, *(count if s == tokens else s for s in shape[1:]))
        full = torch.ones if name == "cos" or dtype == torch.bool else torch.zeros
        made[name] = full(sizes, dtype=dtype)
    return made


@cache
def _measured(
    cls: type[nn.Module],
    arguments: tuple[tuple[str, Value], ...],
    shape: tuple[int, ...],
    inputs: _Given = (),
) -> _Found | GraftError:
    """What a class does with these arguments on [batch, tokens, dim]; a mistake is kept as it is, too."""
    given = dict(arguments)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            with torch.device("meta"):
                bare = cls(**given).eval()
            plain = cls(**given).eval()
            trial = copy.deepcopy(plain)
            beside = _inputs(inputs, shape[0], shape[0])
            made = _run(trial, _random(shape), beside)
            if tuple(getattr(made, "shape", ())) != (_BATCH, *shape):
                return _other_shape(cls.__name__, shape, made)
            mixes, causal, any_length = _mixing(trial, shape, inputs)
    except Exception as error:  # the user's code may raise anything
        return _refused(cls.__name__, error)
    first = next(iter(inspect.signature(plain.forward).parameters))
    try:
        examples = {first: torch.zeros(_BATCH, *shape), **beside}
        batch = {n: {0: "batch"} if len(t) == _BATCH else {} for n, t in examples.items()}
        traced = capture(Model(plain, examples, dynamic=batch))
    except Exception as error:
        return _refused(cls.__name__, error, "cannot be traced")
    if isinstance(traced.inputs[0].shape[0], int):
        notes = tuple(Note(n) for n in traced.facts.notes)
        return GraftError(
            Diagnostic("G433", f"`{cls.__name__}` is traced for one batch size alone", notes=notes)
        )
    featuriser = operator = 0
    for op in flatten(traced).ops:
        count = op_flops(op) // _BATCH
        if op.target in LINEARS or op.target in CONVS:
            featuriser += count
        else:
            operator += count
    params = sum(p.numel() for p in bare.parameters())
    slots = slots_of(bare)
    return _Found(Cost(params, operator, featuriser), slots, mixes, causal, any_length)


def _refused(name: str, error: Exception, what: str = "") -> GraftError:
    told = user_error(error, f"`{name}`", name)
    first = told.diagnostics[0] if isinstance(told, GraftError) else None
    message = first.message if first else str(error)
    if what:
        message = f"`{name}` {what}: {message.partition(': ')[2] or message}"
    return GraftError(Diagnostic("G433", message, notes=first.notes if first else ()))


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(_BATCH, *shape)


def _run(module: nn.Module, x: Tensor, inputs: Mapping[str, Tensor]) -> object:
    with torch.no_grad():
        return module(x, **inputs)


def _mixing(module: nn.Module, shape: tuple[int, ...], inputs: _Given) -> tuple[bool, bool, bool]:
    """(an output depends on other tokens, on no later one, other token counts are taken).

    Parameters are drawn anew: a map that starts at zero would hide what it reads.
    """
    tokens, width = shape
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3 / max(1.0, width**0.5) if parameter.ndim > 1 else 0.3)
    few = min(tokens, _FEW_TOKENS) - 1 if tokens > 2 else tokens + 1
    try:
        trial = _run(module, _random((few, width)), _inputs(inputs, tokens, few))
        free = getattr(trial, "shape", None) == (_BATCH, few, width)
    except Exception:  # a fixed length is no mistake
        free = False
    count = few if free else tokens
    if count < 2:
        return False, True, free
    x = _random((count, width))
    later, middle = x.clone(), count // 2
    later[:, middle] += torch.randn(width)
    beside = _inputs(inputs, tokens, count)
    before, after = _run(module, x, beside), _run(module, later, beside)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    moved = (after - before).abs().amax(dim=(0, 2)) > _LEAK * before.abs().max().clamp(min=1e-12)
    others = moved.clone()
    others[middle] = False
    return bool(others.any()), not bool(moved[:middle].any()), free


def slots_of(module: nn.Module) -> tuple[Slot, ...]:
    """A slot for each map (a weight, maybe a bias) by its path, and for each other parameter by its name."""
    found: list[Slot] = []
    for path, inner in module.named_modules():
        names = [n for n, _ in inner.named_parameters(recurse=False)]
        if path and names and "weight" in names and set(names) <= {"weight", "bias"}:
            found.append(Slot(path, path))
            continue
        found += [Slot(f"{path}.{name}" if path else name, path, parameter=name) for name in names]
    return tuple(found)


def _other_shape(name: str, wanted: tuple[int, ...], made: object) -> GraftError:
    found = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
    return GraftError(
        Diagnostic(
            "G433",
            f"`{name}` returns another shape than it is given",
            wanted=str([_BATCH, *wanted]),
            found=str(found),
        )
    )
