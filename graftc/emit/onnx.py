"""The student as an ONNX file, written whole or not at all, and what it says of itself."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftc.emit.files as files
from graftc.diagnostics import Diagnostic, GraftError, Note, NotRunError, fail
from graftc.emit.build import Build
from graftc.emit.examples import example_sizes
from graftc.emit.package import stored_state
from graftc.emit.purity import check_pure

OPSET = 20
_UNTRAINED = ("untrained", "none")
_EMBEDDED_LIMIT = 1_800_000_000  # a protobuf holds 2 GB; above, weights go to a file beside it


def export_onnx(
    build: Build, output: Path | None = None, *, run: str | None = None, opset: int = OPSET
) -> Path:
    """Write the student of a build as ONNX; returns the file's path (`DIR/student.onnx` by default).

    `run`: whose weights, the latest finished run's by default, or `untrained`. Inputs, outputs and dynamic
    dimensions have the names of `config.yaml`. Raises GraftError for an operator that ONNX lacks,
    with its place in the model, and for a dynamic dimension that the exporter fixed.
    """
    target = Path(output) if output is not None else build.path / "student.onnx"
    chosen = chosen_run(build, run)
    model = build.student(chosen)
    config = build.config()
    facts = {
        "graftc.build": str(build.manifest.get("weights", {}).get("student", "")),
        "graftc.run": chosen or "",
        "graftc.weights": files.state_hash(stored_state(model)[0]),
        "graftc.version": str(config["versions"]["graftc"]),
    }
    return export_module(model, config, target, opset=opset, facts=facts)


def chosen_run(build: Build, run: str | None) -> str | None:
    """The run that is meant: the one named, the latest finished one, or None for the untrained student."""
    latest = build.latest_run()
    return None if run in _UNTRAINED else run or (latest.id if latest else None)


def export_module(
    model: nn.Module,
    config: Mapping[str, Any],
    target: Path,
    *,
    opset: int = OPSET,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a package's model as ONNX, `facts` in its metadata; see `export_onnx`."""
    needs("onnx")
    needs("onnxscript")
    if target.is_dir():
        fail("G640", "the output is a directory, not a file", site=str(target),
             help=f"write `{target / 'student.onnx'}`")  # fmt: skip
    program = _export(model, config, opset)
    _add_metadata(program, config, facts or {})
    _check_dynamic(program, config)
    size = sum(t.numel() * t.element_size() for t in stored_state(model)[0].values())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".graftc-partial-", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            with quiet():
                program.save(str(partial), external_data=size > _EMBEDDED_LIMIT)
            _install(partial, target)
    except OSError as error:
        files.cannot_write(error, target)
    return target


def _install(partial: Path, target: Path) -> None:
    """Move a new file to its place, its weights before it; those of the file it replaces go last.

    Weights beside the file are called by their hash: the file that stands at `target` keeps its own
    until the new one has its name.
    """
    data = _own_data(partial)
    name = data.name if data is not None else None
    new = data is not None and not (target.parent / data.name).exists()
    try:
        if data is not None:
            with files.whole_file(target.parent / data.name) as whole:
                data.replace(whole)
        with files.whole_file(target) as whole:
            partial.replace(whole)
    except BaseException:
        if new and name is not None:
            (target.parent / name).unlink(missing_ok=True)
        raise
    stale = re.compile(re.escape(target.name) + r"(\.[0-9a-f]{16})?\.data")
    for other in list(target.parent.iterdir()):
        if other.name != name and stale.fullmatch(other.name) and other.is_file():
            with suppress(OSError):  # the export is whole all the same
                other.unlink()


def _own_data(partial: Path) -> Path | None:
    """The file of weights beside `partial`, renamed to its hash there and inside `partial`."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    beside = [p for p in partial.parent.iterdir() if p != partial]
    if not beside:
        return None
    (data,) = beside
    with open(data, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    named = data.rename(data.with_name(f"{partial.name}.{digest}.data"))
    proto = onnx.load(str(partial), load_external_data=False)
    for tensor in _tensors(proto):
        if uses_external_data(tensor):
            next(e for e in tensor.external_data if e.key == "location").value = named.name
    partial.write_bytes(proto.SerializeToString())
    return named


def _tensors(proto: Any) -> Iterator[Any]:
    """Every tensor of a model, those in attributes and in subgraphs too."""
    graphs: list[Any] = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())
        for attribute in (a for node in graph.node for a in node.attribute):
            yield attribute.t
            yield from attribute.tensors
            graphs += [attribute.g, *attribute.graphs]


def needs(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        missing = f"{package} is not installed"
        raise NotRunError(Diagnostic("G641", missing, site="export", help=f"pip install {package}"))


def dimension(name: str) -> str:
    """A dynamic dimension's name as `torch.export.Dim` takes it."""
    return re.sub(r"\W", "_", name)


def _export(model: nn.Module, config: Mapping[str, Any], opset: int) -> Any:
    sizes = example_sizes(config)
    dims = {n: torch.export.Dim(dimension(n), min=1) for n in sizes}
    inputs: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for port in config["inputs"]:
        name, shape = str(port["name"]), list(port["shape"])
        dtype = getattr(torch, port["dtype"])
        concrete = [sizes[s] if isinstance(s, str) else int(s) for s in shape]
        inputs[name] = torch.zeros(concrete, dtype=dtype, device=device)
        shapes[name] = {i: dims[s] for i, s in enumerate(shape) if isinstance(s, str)}
    inputs = _in_dtype_of(model, inputs, config)
    sites: Mapping[str, str] = config.get("provenance", {})
    try:
        with torch.no_grad(), quiet():
            given = _traced(model, inputs, shapes, sites)
            program = torch.onnx.export(
                *given, kwargs=None if len(given) == 1 else inputs, dynamo=True, opset_version=opset,
                verbose=False, dynamic_shapes=shapes, input_names=list(inputs),
                output_names=output_names(config),
            )  # fmt: skip
    except GraftError:
        raise
    except Exception as error:
        raise refused(error, model, inputs, shapes, sites) from error
    assert program is not None
    assert program.exported_program is not None
    check_pure(program.exported_program, sites)
    return program


def _traced(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Any],
    sites: Mapping[str, str],
) -> tuple[Any, ...]:
    """What the exporter is given: the traced model, checked first, since the exporter's own words for it name no place.

    Where a size has a bound (a table of positions), tracing refuses the plain `Dim`, and the exporter, which has other
    ways, is given the model itself; what it traced is checked after it.
    """
    from torch._dynamo.exc import UserError

    try:
        exported = torch.export.export(
            model, (), dict(inputs), dynamic_shapes=dict(shapes), strict=False
        )
    except UserError:
        return (model, ())
    check_pure(exported, sites)
    return (exported,)


def _in_dtype_of(
    model: nn.Module, inputs: dict[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Inputs of the captured dtype follow the model when it was moved to another."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    captured = getattr(torch, config["facts"]["dtype"])
    if parameter is None or parameter.dtype == captured:
        return inputs
    return {n: t.to(parameter.dtype) if t.dtype == captured else t for n, t in inputs.items()}


def output_names(config: Mapping[str, Any]) -> list[str] | None:
    """The outputs' own names; `output` for a single tensor; for a tuple the exporter numbers them."""
    outputs = config["outputs"]
    if outputs["kind"] == "named":
        return [str(n) for n in outputs["names"]]
    return ["output"] if outputs["kind"] == "tensor" else None


def refused(
    error: Exception,
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    shapes: dict[str, Any],
    provenance: Mapping[str, str],
) -> Exception:
    """The exporter's error as a diagnostic: which operator, in which module it stands, and which rule made that.

    `provenance`: edited site → rule and line, of `config.yaml`.
    """
    texts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    whole = "\n".join(texts)
    found = re.search(
        r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", whole
    )
    if found is not None:
        name, site = _where(f"{found[1]}.{found[2]}", model, inputs, shapes)
        message = f"ONNX has no form of `{name}`" + (f", which `{site}` uses" if site else "")
        help_ = "write that module with operators that ONNX has"
        rules = [r for s, r in provenance.items() if f"{site}.".startswith(f"{s}.")]
        notes = tuple(Note(f"made by rule {r}") for r in rules[-1:])
        return GraftError(
            Diagnostic("G642", message, site=site or "the student", help=help_, notes=notes)
        )
    first = next((line for line in whole.splitlines() if line.strip()), type(error).__name__)
    return GraftError(
        Diagnostic(
            "G643", f"the ONNX exporter refused the model: {first[:300]}", site="torch.onnx.export",
            notes=(Note(f"{type(error).__name__} of torch {torch.__version__}"),),
        )
    )  # fmt: skip


def _where(
    name: str, model: nn.Module, inputs: dict[str, torch.Tensor], shapes: dict[str, Any]
) -> tuple[str, str | None]:
    """The operator as the model calls it (the exporter names a part of it), and the module that does."""
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
            graphs = [exported.graph, exported.run_decompositions().graph]
    except Exception:  # the first error is the one to show
        return name, None
    word = name.split(".")[1]
    calls = [
        n for graph in graphs for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)
    ]
    exact = [n for n in calls if str(n.target) == name]
    # `prims.bessel_j0` is what is left of `aten.special_bessel_j0`.
    alike = [n for n in calls if str(n.target).split(".")[1].endswith(word)]
    for node in [*exact, *alike]:
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        site = next((path for path, _ in reversed(list(stack.values())) if path), None)
        return str(node.target), site
    return name, None


def _add_metadata(program: Any, config: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """What the file was made from; and on each node of an edited site, the rule and line that made it."""
    about = {k: config[k] for k in ("inputs", "outputs", "facts")}
    program.model.metadata_props.update(
        {**facts, "graftc.about": json.dumps(about, sort_keys=True)}
    )
    provenance: Mapping[str, str] = config.get("provenance", {})
    if not provenance:
        return
    for node in program.model.graph:
        scopes = str(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        paths = re.findall(r"'([^']*)'", scopes)
        rule = next((provenance[p] for p in reversed(paths) if p in provenance), None)
        if rule is not None:
            node.metadata_props["graftc.rule"] = rule


def _check_dynamic(program: Any, config: Mapping[str, Any]) -> None:
    """Each dimension that was declared dynamic is so in the file."""
    by_name = {v.name: v for v in program.model.graph.inputs}
    for port in config["inputs"]:
        value = by_name.get(str(port["name"]))
        if value is None or value.shape is None:
            continue
        for i, size in enumerate(port["shape"]):
            if isinstance(size, str) and isinstance(value.shape[i], int):
                fail("G644", f"the exporter fixed `{size}` of `{port['name']}` at {value.shape[i]}",
                     site="torch.onnx.export", wanted=f"a dynamic `{size}`")  # fmt: skip


@contextmanager
def quiet() -> Generator[None]:
    """Without the exporter's progress lines, warnings and log records."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
