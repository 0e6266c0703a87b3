"""The contract on shapes: which sizes a graph is right for, proved before it is written.

`torch.export` may hand over a graph with a dynamic size that is right at the traced size alone. Its own
guards know: they are read here, with the line of the model that made them. A guard that a wanted size
breaks is a refusal; and whatever the guards say, the traced graph must give what the model gives at every
corner, for a size can also be baked into a constant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.deploy.regions import Traced, trace
from graftc.deploy.request import Range, Request
from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.emit.examples import tensors_of
from graftc.emit.purity import check_pure

Draw = Callable[[Mapping[str, int]], Mapping[str, Tensor]]
"""Named inputs for the sizes of the dynamic dimensions."""

_CLOSE = 1e-4


@dataclass(frozen=True)
class Proof:
    """What is known of a dynamic dimension: the range that was asked for, and the one that torch proves."""

    asked: Range
    low: int
    high: int | None
    places: tuple[tuple[str, int], ...]

    def text(self) -> str:
        return f"{self.low}.." + ("" if self.high is None else str(self.high))


@dataclass(frozen=True)
class Guard:
    """A condition on sizes under which a traced graph holds, and the line that asked for it."""

    text: str
    where: str
    holds: Callable[[Mapping[str, int]], bool]


def prove(
    model: nn.Module,
    config: Mapping[str, Any],
    request: Request,
    draw: Draw,
    paths: Sequence[str] = (),
) -> tuple[Traced, list[Proof]]:
    """The traced graph, which also returns the values of regions (`paths`), and the proof of each dimension.

    Raises GraftError, with the guards and their lines, where the model does not take the wanted sizes, or
    the graph is right at the traced sizes only.
    """
    inputs = dict(draw({r.name: r.traced for r in request.ranges}))
    places = _places(config)
    exported, counts = _export(model, inputs, request.ranges, places, paths, draw)
    check_pure(exported, config.get("provenance", {}))  # else a comparison would blame the sizes
    guards = [g for g in read_guards(exported, places) if g.text]
    for name, sizes in request.corners():
        _compare(model, exported, guards, draw(sizes), sizes, name)
    return (exported, counts), [_proof(r, exported, places) for r in request.ranges]


def _places(config: Mapping[str, Any]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Dynamic dimension → the inputs and axes that have it: one symbol, however many places."""
    found: dict[str, list[tuple[str, int]]] = {}
    for port in config["inputs"]:
        for axis, size in enumerate(port["shape"]):
            if isinstance(size, str):
                found.setdefault(size, []).append((str(port["name"]), axis))
    return {k: tuple(v) for k, v in found.items()}


def dynamic_shapes(
    inputs: Mapping[str, Tensor],
    places: Mapping[str, Sequence[tuple[str, int]]],
    dims: Mapping[str, Any],
) -> dict[str, dict[int, Any]]:
    """torch.export's argument: axes of each input that are dynamic, equal dimensions by one object."""
    shapes: dict[str, dict[int, Any]] = {n: {} for n in inputs}
    for dimension, where in places.items():
        if dimension in dims:
            for name, axis in where:
                shapes[name][axis] = dims[dimension]
    return shapes


def _export(
    model: nn.Module,
    inputs: dict[str, Tensor],
    ranges: Sequence[Range],
    places: Mapping[str, Sequence[tuple[str, int]]],
    paths: Sequence[str],
    draw: Draw,
) -> Traced:
    free = {r.name: torch.export.Dim(_dim(r.name), min=1) for r in ranges if r.free}
    bound = {
        r.name: torch.export.Dim(_dim(r.name), min=r.low, max=r.high) for r in ranges if r.free
    }  # fmt: skip
    first: Exception | None = None
    for dims in (free, bound) if free else ({},):
        try:
            return trace(model, inputs, dynamic_shapes(inputs, places, dims), paths)
        except Exception as error:
            first = first or error
            if not free or not _about_shapes(error):
                raise
    assert first is not None
    raise _refused(model, inputs, places, ranges, draw, first) from first


def _dim(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _about_shapes(error: BaseException) -> bool:
    text = str(error)
    return "onstraint" in text or "specialized" in text or "Dim" in text


def _refused(
    model: nn.Module,
    inputs: dict[str, Tensor],
    places: Mapping[str, Sequence[tuple[str, int]]],
    ranges: Sequence[Range],
    draw: Draw,
    error: Exception,
) -> GraftError:
    """Trace again with sizes left open: that succeeds, and the guards with their lines say what is not open."""
    dims = {r.name: torch.export.Dim.AUTO for r in ranges}
    notes: list[Note] = []
    broken: list[str] = []
    try:
        guards = read_guards(
            trace(model, inputs, dynamic_shapes(inputs, places, dims), ())[0], places
        )
    except Exception:  # the first error is the one to show
        guards = []
    for r in ranges:
        for size in dict.fromkeys((r.low, r.high)):
            sizes = {q.name: q.usual for q in ranges} | {r.name: size}
            against = [g for g in guards if not g.holds(sizes)]
            if against:
                broken.append(f"{r.name}={size}")
                notes += [Note(line) for line in _lines_at(model, draw(sizes))]
                notes += [Note(f"{g.where}: needs {g.text}") for g in against]
    if not notes:
        lines = [
            line.strip(" -")
            for line in str(error).splitlines()
            if "guard" in line or "special" in line
        ]
        notes = [Note(line) for line in dict.fromkeys(lines)]
    return GraftError(
        Diagnostic(
            "G660", "the model does not take these sizes: its graph would be right at the traced ones only",
            site="--dynamic", wanted=", ".join(str(r) for r in ranges),
            found=", ".join(dict.fromkeys(broken)) or None, notes=tuple(dict.fromkeys(notes))[:6],
            help="narrow the range, or leave this dimension out",
        )
    )  # fmt: skip


def read_guards(
    exported: torch.export.ExportedProgram, places: Mapping[str, Sequence[tuple[str, int]]]
) -> list[Guard]:
    """The conditions on input sizes under which a traced graph holds; equalities of inputs are none of them.

    >>> from torch.export import Dim, export
    >>> class Half(nn.Module):
    ...     def forward(self, x): return x + (torch.ones(4) if x.shape[0] // 2 == 2 else 0)
    >>> traced = export(Half(), (), {"x": torch.ones(4)}, dynamic_shapes={"x": {0: Dim.AUTO}})
    >>> guards = read_guards(traced, {"rows": [("x", 0)]})
    >>> all(g.holds({"rows": 4}) for g in guards), all(g.holds({"rows": 8}) for g in guards)
    (True, False)
    """
    env = _shape_env(exported)
    if env is None:
        return []
    named = _symbols(exported, env, places)
    found: dict[str, Guard] = {}
    for guard in env.guards:
        expression = guard.expr
        symbols = {
            s: named[str(s)] for s in getattr(expression, "free_symbols", ()) if str(s) in named
        }
        if not symbols or "Ne(" in str(expression)[:3]:
            continue  # `Ne` tells contiguous from not; it changes no value
        text = re.sub(r"\bs\d+\b", lambda m: named.get(m[0], (m[0],))[0], str(expression))
        found.setdefault(text, Guard(text, _line(guard), _holds(expression, symbols)))
    return list(found.values())


def _holds(
    expression: Any, symbols: Mapping[Any, tuple[str, ...]]
) -> Callable[[Mapping[str, int]], bool]:
    def check(sizes: Mapping[str, int]) -> bool:
        values = {
            s: next((sizes[n] for n in names if n in sizes), None) for s, names in symbols.items()
        }  # fmt: skip
        if any(v is None for v in values.values()):
            return True
        try:
            return bool(expression.subs(values))
        except (TypeError, ValueError):  # an expression that sympy cannot reduce to a truth value
            return True

    return check


def _shape_env(exported: torch.export.ExportedProgram) -> Any:
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if node.op == "placeholder" and mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None


def _symbols(
    exported: torch.export.ExportedProgram,
    env: Any,
    places: Mapping[str, Sequence[tuple[str, int]]],
) -> dict[str, tuple[str, ...]]:
    """Symbol → how it is called: the dimension's name where it has one, then `input.axis`."""
    names: dict[str, list[str]] = {}
    dimensions = {(n, axis): d for d, where in places.items() for n, axis in where}

    def add(symbol: str, name: str, axis: int) -> None:
        called = dimensions.get((name, axis))
        names.setdefault(symbol, []).extend([called] if called else [f"{name}.{axis}"])

    for source, symbol in getattr(
        env, "source_to_var", {}
    ).items():  # a symbol that became a number, too
        found = re.fullmatch(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", str(source))
        if found is not None:
            add(str(symbol), found[1], int(found[2]))
    for node in exported.graph.nodes:
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if node.op == "placeholder" and isinstance(size, torch.SymInt):
                add(str(size.node.expr), node.name, axis)
    return {k: tuple(dict.fromkeys(v)) for k, v in names.items()}


def _line(guard: Any) -> str:
    place = getattr(guard, "sloc", None)
    frame = getattr(place, "maybe_user_loc", None) or getattr(place, "framework_loc", None)
    if frame is None:
        return "torch"
    return (
        str(frame) if isinstance(frame, str) else f"{frame.filename}:{frame.lineno} in {frame.name}"
    )


def _compare(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    guards: Sequence[Guard],
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    name: str,
) -> None:
    """The traced graph against the model at these sizes."""
    shown = ", ".join(f"{k}={v}" for k, v in sizes.items())
    with torch.no_grad():
        try:
            wanted = tensors_of(model(**inputs))
        except Exception as error:
            lines = own_lines(error)
            fail("G660", f"the model itself does not run at {shown}: {type(error).__name__}: {first_line(error)}",
                 site="--dynamic", notes=[Note(line) for line in lines],
                 help="narrow the range to sizes that the model takes")  # fmt: skip
        try:
            found = tensors_of(exported.module(check_guards=False)(**inputs))[: len(wanted)][
                : len(wanted)
            ]
            why = _difference(wanted, found)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
    if why is not None:
        broken = [Note(f"{g.where}: needs {g.text}") for g in guards if not g.holds(sizes)]
        fail("G660", f"the traced graph is wrong at {shown} ({name}): {why}", site="--dynamic", notes=broken[:6],
             help="narrow the range: this size was fixed by tracing")  # fmt: skip


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return f"shape {tuple(b.shape)} in place of {tuple(a.shape)}"
        scale = float(a.abs().max()) if a.numel() else 0.0
        off = float((a - b).abs().max()) if a.numel() else 0.0
        if not off <= _CLOSE * max(scale, 1e-30):
            return f"{off / max(scale, 1e-30):.1e} of the largest output off"
    return None


def _lines_at(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    """The model's own lines, where it fails on these inputs."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return own_lines(error)
    return []


def own_lines(error: BaseException) -> list[str]:
    """The model's own lines at which an error arose, the innermost first."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "graftc/deploy" not in f.filename]
    return [
        f"{f.filename}:{f.lineno} in {f.name}: {(f.line or '').strip()}" for f in own[-2:][::-1]
    ]


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next((t.strip() for t in str(error).splitlines() if t.strip()), "")[:200]


def _proof(
    r: Range,
    exported: torch.export.ExportedProgram,
    places: Mapping[str, Sequence[tuple[str, int]]],
) -> Proof:
    where = tuple(places.get(r.name, ()))
    low, high = r.low, r.high
    for node in exported.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        for name, axis in where:
            if (
                node.op == "placeholder"
                and node.name == name
                and isinstance(shape[axis], torch.SymInt)
            ):
                span = exported.range_constraints.get(shape[axis].node.expr)
                if span is not None:
                    return Proof(r, _bound(span.lower, 1), _bound(span.upper, None), where)
    return Proof(r, low, high, where)


def _bound(value: Any, default: int | None) -> Any:
    """A bound of torch's as a number; `default` for none (sympy's infinities are of several classes)."""
    if "nfinity" in type(value).__name__ or "oo" in str(value):
        return default
    number = int(value)
    return default if number >= 2**31 else number
