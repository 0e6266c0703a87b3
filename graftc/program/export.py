"""`torch.export` as graftc needs it: no fused fast paths, no wrapped regions, no mutation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graftc.diagnostics import Diagnostic, GraftError, Note
from graftc.program.fixed import values_known
from graftc.program.impure import backwards_noted, certain_choices, check_random
from graftc.program.kept import as_it_was
from graftc.program.model import user_error
from graftc.program.program import ATEN, DATA_DEPENDENT
from graftc.program.repeats import Blocks, NotShared, traced_once
from graftc.program.saved import Saved
from graftc.program.state import check_attributes, check_constants, without_writes
from graftc.program.traces import own_lines

Dynamic = Mapping[str, Mapping[int, str]]
Traced = tuple[torch.export.ExportedProgram, Blocks]


@dataclass(frozen=True)
class Exported:
    """What tracing gave: the program, the blocks that it holds only once, the dimensions that stayed
    dynamic, sentences on those that did not, and warnings of what is not in the graph."""

    program: torch.export.ExportedProgram
    blocks: Blocks
    dynamic: dict[str, dict[int, str]]
    notes: list[str]
    warnings: tuple[Diagnostic, ...] = ()


def export(
    module: nn.Module,
    inputs: dict[str, Any],
    dynamic: Dynamic,
    share: bool = True,
    values: Mapping[str, torch.Tensor] | None = None,
    random: bool = False,
) -> Exported:
    """Trace a module; with `share`, blocks that repeat are traced once (`graftc.program.repeats`).

    `values`: of inputs that are fixed, for what the model reads out of them. `random`: numbers that forward draws
    are no error, and a choice by one of them that is certain (drop a layer with probability 0) is made.

    Raises GraftError with the user's own line where the model cannot be traced, NotShared where it has
    to be traced without sharing.
    """
    if isinstance(module, Saved):
        return _saved(module.exported, dynamic)
    lost: dict[str, Diagnostic] = {}
    run = partial(_run, share=share, values=values or {}, lost=lost, random=random)
    dims = {d: torch.export.Dim(d) for by in dynamic.values() for d in by.values()}
    left = {k: dict(v) for k, v in dynamic.items()}
    notes: list[str] = []
    try:
        exported, blocks = run(module, inputs, _shapes(inputs, dynamic, lambda d: dims[d]))
    except NotShared:
        raise
    except Exception as error:
        if not dims or not _is_shape_error(error):
            raise cannot_capture(error) from error
        exported, blocks = _what_stays_dynamic(run, module, inputs, dynamic)
        left = _still_dynamic(exported, dynamic)
        fixed = sorted(set(dims) - {d for by in left.values() for d in by.values()})
        reason = _reason(error)
        notes = [f"{', '.join(fixed)} fixed at the example's size: {reason}"] if fixed else []
    if blocks.kinds and _mutates(exported):
        raise NotShared("the model writes to tensors, perhaps to a block's inputs")
    exported = _functional(exported)
    inline_regions(exported.graph_module)
    if not random:
        check_random(exported.graph_module, module.training)
    warned = (*without_writes(exported, told=not random), *lost.values())
    return Exported(exported, blocks, {k: v for k, v in left.items() if v}, notes, warned)


def traced(
    module: nn.Module, inputs: dict[str, Any], values: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    """What forward runs in the mode that the module is in, at the example's sizes; blocks that repeat once.

    Raises GraftError with the user's own line where the model cannot be traced.
    """
    run = partial(_run, module, inputs, None, values=values, lost={})
    try:
        try:
            return run(share=True)[0]
        except NotShared:
            return run(share=False)[0]
    except Exception as error:
        raise cannot_capture(error) from error


def _saved(program: torch.export.ExportedProgram, dynamic: Dynamic) -> Exported:
    """A program that was traced when it was saved."""
    functional = _functional(program)
    inline_regions(functional.graph_module)
    check_random(functional.graph_module, training=False)
    notes = [] if dynamic else ["the program was saved with every size fixed"]
    left = {k: dict(v) for k, v in dynamic.items()}
    return Exported(functional, Blocks(), left, notes, tuple(without_writes(functional)))


def _what_stays_dynamic(
    run: Callable[..., Traced], module: nn.Module, inputs: dict[str, Any], dynamic: Dynamic
) -> Traced:
    """Each dimension dynamic that can be: one that the model fixes does not fix the others."""
    try:
        return run(module, inputs, _shapes(inputs, dynamic, lambda _: torch.export.Dim.AUTO))
    except NotShared:
        raise
    except Exception:  # e.g. a guard that only a fixed size satisfies
        try:
            return run(module, inputs, None)
        except NotShared:
            raise
        except Exception as again:
            raise cannot_capture(again) from again


def _shapes(inputs: Mapping[str, Any], dynamic: Dynamic, dim: Any) -> dict[str, Any]:
    return {
        k: {i: dim(d) for i, d in dynamic[k].items()}
        if k in dynamic
        else pytree.tree_map(lambda _: None, v)
        for k, v in inputs.items()
    }


def _run(
    module: nn.Module,
    inputs: dict[str, Any],
    shapes: Any,
    share: bool,
    values: Mapping[str, Any],
    lost: dict[str, Diagnostic],
    random: bool = False,
) -> Traced:
    once = traced_once(module) if share else nullcontext(Blocks())
    known, noted = values_known(module, values), backwards_noted(lost)
    quietly = (
        _silent(),
        torch.no_grad(),
        _no_fast_path(),
        *((certain_choices(),) if random else ()),
    )
    with ExitStack() as stack:
        changes = stack.enter_context(as_it_was(module))
        for context in (*quietly, noted):
            stack.enter_context(context)
        blocks = stack.enter_context(once)
        stack.enter_context(known)
        exported = torch.export.export(
            module, (), dict(inputs), dynamic_shapes=shapes, strict=False
        )
    if not random:  # eval mode has been looked at; of train mode only what differs is asked
        check_constants(exported, module, changes)
        check_attributes(module, inputs, changes)
    return exported, blocks


@contextmanager
def _silent() -> Generator[None]:
    """torch prints half-made graphs and logs before it raises; the diagnostic says what a user needs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _no_fast_path() -> Generator[None]:
    """nn.TransformerEncoder's fused inference path is one opaque op; its ordinary path computes the same."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _still_dynamic(
    exported: torch.export.ExportedProgram, dynamic: Dynamic
) -> dict[str, dict[int, str]]:
    """The dimensions whose size is still a symbol; two names of one symbol stay two only if apart."""
    nodes = {str(n.name): n for n in exported.graph.nodes if n.op == "placeholder"}
    found: dict[str, dict[int, str]] = {}
    for name, dims in dynamic.items():
        shape = nodes[name].meta["val"].shape
        found[name] = {i: d for i, d in dims.items() if not _settled(shape[i])}
    return found


def _settled(size: int | torch.SymInt) -> bool:
    """Whether tracing found that a size can only be one number."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def _functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without mutation, so that a value's operands are all that it depends on."""
    if not _mutates(exported):
        return exported
    with warnings.catch_warnings(), torch.no_grad(), _no_fast_path():
        warnings.simplefilter("ignore")
        return exported.run_decompositions({})


_HARMLESS = frozenset({ATEN.detach_.default})


def _mutates(exported: torch.export.ExportedProgram) -> bool:
    schemas = [
        getattr(n.target, "_schema", None)
        for n in exported.graph.nodes
        if n.op == "call_function" and n.target not in _HARMLESS
    ]
    return any(s is not None and s.is_mutable for s in schemas)


def inline_regions(root: fx.GraphModule) -> None:
    """Inline `with torch.no_grad():` and `with torch.autocast(enabled=False):`, which change no value here.

    Before unflatten, so that modules called inside such a region are modules of the tree as well. Raises
    GraftError (G250) for a region under autocast: its casts are not in the graph.
    """
    regions = {torch.ops.higher_order.wrap_with_set_grad_enabled}
    autocast = getattr(torch.ops.higher_order, "wrap_with_autocast", None)
    while True:
        found = [
            n
            for n in root.graph.nodes
            if n.op == "call_function" and (n.target in regions or n.target is autocast)
        ]
        if not found:
            return
        for node in found:
            if node.target is autocast and node.args[2]:
                raise _under_autocast(node)
            _inline(root, node)
        root.graph.eliminate_dead_code()
        root.recompile()


def _inline(root: fx.GraphModule, node: fx.Node) -> None:
    position = next(
        i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
    )
    attribute: Any = node.args[position]
    inner = getattr(root, str(attribute.target))
    given = iter(node.args[position + 1 :])
    copies: dict[fx.Node, Any] = {}
    with root.graph.inserting_before(node):
        for n in inner.graph.nodes:
            if n.op == "placeholder":
                copies[n] = next(given)
            elif n.op == "get_attr":  # a region inside the region
                name = f"{attribute.target}_{n.target}"
                setattr(root, name, getattr(inner, str(n.target)))
                copies[n] = root.graph.get_attr(name)
            elif n.op != "output":
                copies[n] = root.graph.node_copy(n, lambda m: copies[m])
    returned = next(n for n in inner.graph.nodes if n.op == "output").args[0]
    results = fx.map_arg(returned, lambda m: copies[m])
    for user in list(node.users):  # a region returns a tuple
        assert isinstance(results, (tuple, list))
        user.replace_all_uses_with(results[user.args[1]])  # pyright: ignore
        root.graph.erase_node(user)
    root.graph.erase_node(node)


def _under_autocast(node: fx.Node) -> GraftError:
    return GraftError(
        Diagnostic(
            "G250",
            "the model runs a part of itself under autocast; the casts it makes cannot be captured",
            site="torch.export",
            wanted="explicit dtypes",
            found=f"torch.autocast(dtype={node.args[1]})",
            notes=tuple(Note(line) for line in own_lines(node.meta.get("stack_trace"))),
            help="cast in forward (`x.to(dtype)`), or capture without autocast",
        )
    )


def _is_shape_error(error: BaseException) -> bool:
    name = type(error).__name__
    text = str(error)
    return "Constraint" in name or "onstraints violated" in text or "specialized" in text


def _reason(error: BaseException) -> str:
    """Why a dimension was fixed: the line that says so, without torch's advice."""
    lines = [line.strip(" -\t") for line in str(error).strip().splitlines()]
    said = next((line for line in lines if "specialized" in line or "!=" in line), lines[0])
    return said[:200]


def cannot_capture(error: BaseException) -> Exception:
    """torch.export's error as a diagnostic with the user's own line and what to do."""
    wrapped = user_error(error, "MODEL", "torch.export")
    assert isinstance(wrapped, GraftError)
    d = wrapped.diagnostics[0]
    if d.code != "G203":  # graftc's own word already
        return wrapped
    text = str(error)
    help_ = "make this part static for the example inputs, or move it out of the model's forward"
    needs_values = ("data-dependent", "non-nested symint", "datadependentoutput")
    if any(w in f"{type(error).__name__} {text}".lower() for w in needs_values):
        help_ = DATA_DEPENDENT
    elif "Cache'> in output" in text:  # transformers' caches
        help_ = 'give `use_cache` as an input of the model: `{…, "use_cache": False}`'
    return GraftError(
        Diagnostic(
            "G210",
            f"the model cannot be captured: {d.message.removeprefix('MODEL raised ')}",
            site="torch.export",
            notes=d.notes or (Note("no line of the user's own is in the trace"),),
            help=help_,
        )
    )
