"""The export directory: model, golden files, manifest and scripts, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

import graftc.emit.files as files
from graftc.deploy import scripts
from graftc.deploy.forms import check_forms
from graftc.deploy.golden import Case, Source, source, write_golden
from graftc.deploy.graph import Graph, build_graph, describe_graph
from graftc.deploy.precision import Choice, choose_islands, lower
from graftc.deploy.regions import WHOLE, Region, movements, regions_of
from graftc.deploy.request import Request
from graftc.deploy.runtimes import TOLERANCE, Opset
from graftc.deploy.shapes import Proof, prove
from graftc.deploy.tensorrt import check_operators, write_tensorrt
from graftc.deploy.triton import write_triton
from graftc.diagnostics import fail
from graftc.emit.build import Build
from graftc.emit.examples import Inputs, tensors_of
from graftc.emit.onnx import needs, quiet
from graftc.emit.package import stored_state, versions

FORMAT = 1
TRACED = "traced graph against the model, every golden shape"
RUNG = ("name", "state", "detail")
_EMBEDDED_LIMIT = 1_800_000_000
_STILL = 0.01
_MOVES_LIMIT = 200_000_000
"""Parameters above which only edited regions are tried for what they move: each trial is a forward pass."""


@dataclass(frozen=True)
class Export:
    """An export on disk, and what it says of itself."""

    path: Path
    manifest: Mapping[str, Any]

    @staticmethod
    def open(path: Path | str) -> Export:
        """Raises GraftError for what is no export directory, or one of another version."""
        folder = Path(path)
        if not is_export(folder):
            fail("G666", "this directory is no export", site=str(folder),
                 wanted="a directory with `manifest.yaml` and `golden/`, written by `graftc export DIR -o OUT`")  # fmt: skip
        manifest = files.read_yaml(folder / "manifest.yaml")
        if manifest.get("graftc_export") != FORMAT:
            fail("G666", "this export was written by another version of graftc", site=str(folder),
                 wanted=f"graftc_export: {FORMAT}", found=str(manifest.get("graftc_export")),
                 help="export the build again")  # fmt: skip
        return Export(folder, manifest)

    @property
    def model(self) -> Path:
        return self.path / "model.onnx"


def is_export(folder: Path) -> bool:
    """Whether graftc wrote that directory as an export."""
    manifest = folder / "manifest.yaml"
    return manifest.is_file() and "graftc_export" in manifest.read_text(errors="replace")[:200]


def write_export(
    build: Build,
    output: Path,
    request: Request,
    *,
    run: str | None = None,
    inputs: Inputs | None = None,
) -> Export:
    """Export the student of a build as `request` says; an older export in `output` is replaced by a whole one.

    `run`: whose weights, None for the untrained student's. `inputs`: named inputs for a batch size, as the
    Task draws them; else random ones. Raises GraftError, and leaves the disk as it was.
    """
    needs("onnx")
    needs("onnxscript")
    model = (
        build.student(run).eval()
        if build.config()["facts"]["mode"] == "eval"
        else build.student(run)
    )
    config = build.config()
    hashes = {
        "plan": files.file_hash(build.path / "plan.yaml"),
        "build": str(build.manifest.get("weights", {}).get("student", "")),
        "student": files.file_hash(build.path / "student" / "model.py"),
        "weights": files.state_hash(stored_state(model)[0]),
    }
    facts = {"graftc.build": hashes["build"], "graftc.run": run or "", "graftc.weights": hashes["weights"],
             "graftc.version": str(config["versions"]["graftc"])}  # fmt: skip
    about = {
        "build": {"path": str(build.path.absolute()), "run": run or "untrained"},
        "hashes": hashes,
    }
    return export_module(model, config, output, request, inputs=inputs, facts=facts, about=about)


def export_module(
    model: nn.Module,
    config: Mapping[str, Any],
    output: Path,
    request: Request,
    *,
    inputs: Inputs | None = None,
    facts: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Export:
    """Export a package's model; see `write_export`. `model` is changed to the request's precision."""
    given = source(config, model, inputs)
    regions = regions_of(model, config.get("provenance", {}))
    paths = [r.path for r in regions]
    traced, proofs = prove(model, config, request, lambda sizes: given.draw(sizes, 0), paths)
    check_forms(traced[0], config.get("provenance", {}))
    usual = {r.name: r.traced for r in request.ranges}
    sample = given.draw(usual, 0)
    total = sum(p.numel() for p in model.parameters())
    moved = regions if total <= _MOVES_LIMIT else [r for r in regions if r.rule]
    moves = movements(model, moved, sample)
    choice = choose_islands(model, request.precision, regions, sample, _declared(regions))
    with torch.no_grad():
        names = _output_names(config, len(tensors_of(model(**sample))))
    with files.whole_directory(output, ours=is_export) as partial:
        # Golden outputs are the float32 student's, whatever the precision; so they come first.
        cases = write_golden(partial / "golden", model, request, config, regions, names, given)
        outside = _outside(model, config, request, proofs, given)
        lower(model, request.precision, list(choice.islands))
        free = [r for r in request.ranges if r.free]
        places = {p.asked.name: p.places for p in proofs}
        # The range that is proved: a model that is not free of a size cannot be traced again as if it were.
        proved = {p.asked.name: p for p in proofs}
        dims = {
            r.name: torch.export.Dim(r.name, min=proved[r.name].low, max=proved[r.name].high)
            for r in free
        }
        graph = build_graph(
            model, config, regions, sample, places, dims, request.opset.version,
            traced if request.precision == "fp32" else None,
        )  # fmt: skip
        odd = _odd_heads(graph.model)
        if odd is not None and request.precision == "fp16" and request.opset.chosen:
            why = f"fp16, heads of {odd}: fused attention takes multiples of 8"
            request = replace(request, opset=Opset(20, why, chosen=True))
            graph = build_graph(model, config, regions, sample, places, dims, 20)
        describe_graph(graph, config, facts or {})
        support = check_operators(graph.model, request)
        _save(graph, partial)
        manifest = {
            "graftc_export": FORMAT,
            **(about or {}),
            **_described(config, request, graph, regions, proofs, moves, choice, cases, given),
            "tensorrt": support,
            "rungs": _rungs(cases, support),
        }
        _write_index(partial, request, graph, regions, cases, names, outside)
        shutil.copyfile(Path(scripts.__file__).with_name("verify.py"), partial / "verify.py")
        if request.to == "tensorrt":
            write_tensorrt(partial, config, request, cases)
        write_triton(partial, config, request, _output_shapes(graph), sample)
        files.write_yaml(
            partial / "manifest.yaml", manifest
        )  # last: its presence says that all is there
    return Export.open(output)


def _odd_heads(model: ir.Model) -> int | None:
    """A head size of an Attention node that is no multiple of 8; None where all are."""
    for node in model.graph:
        shape = (
            node.inputs[0].shape
            if node.op_type == "Attention" and node.inputs[0] is not None
            else None
        )
        size = None if shape is None else shape[-1]
        if isinstance(size, int) and size % 8:
            return size
    return None


def _output_shapes(graph: Graph) -> list[tuple[str, list[int | str]]]:
    """Outputs of the graph: names and shapes, dynamic sizes by name."""
    found: list[tuple[str, list[int | str]]] = []
    for value in graph.model.graph.outputs:
        shape = value.shape if value.shape is not None else ()
        found.append((str(value.name), [s if isinstance(s, int) else str(s) for s in shape]))
    return found


def _declared(regions: Sequence[Region]) -> dict[str, str]:
    """The float32 islands that operators' specs state, as module paths."""
    from graftc.operators.specs import SPECS

    by_class = {
        module.partition(":")[2]: spec
        for spec in SPECS.values()
        for module in (spec.module, *(f.module for f in spec.forms if f.module))
    }
    found: dict[str, str] = {}
    for region in regions:
        spec = by_class.get(region.operator) if region.rule else None
        for inner in spec.islands if spec is not None else ():
            found[f"{region.path}.{inner}".strip(".")] = f"stated by {spec.name if spec else ''}"
    return found


def _output_names(config: Mapping[str, Any], count: int) -> list[str]:
    outputs = config["outputs"]
    if outputs["kind"] == "named" and len(outputs["names"]) == count:
        return [str(n) for n in outputs["names"]]
    return ["output"] if outputs["kind"] == "tensor" else [f"output_{i}" for i in range(count)]


def _save(graph: Graph, folder: Path) -> None:
    size = sum(
        v.const_value.nbytes
        for v in graph.model.graph.initializers.values()
        if v.const_value is not None
    )
    with quiet():
        if size > _EMBEDDED_LIMIT:
            ir.save(graph.model, folder / "model.onnx", external_data="model.onnx.data")
        else:
            ir.save(graph.model, folder / "model.onnx")


def _described(
    config: Mapping[str, Any],
    request: Request,
    graph: Graph,
    regions: Sequence[Region],
    proofs: Sequence[Proof],
    moves: Mapping[str, float],
    choice: Choice,
    cases: Sequence[Case],
    given: Source,
) -> dict[str, Any]:
    import onnx

    still = sorted(p for p, m in moves.items() if m < _STILL)
    return {
        "versions": {**versions(), "onnx": onnx.__version__, **{k: str(v) for k, v in config["versions"].items() if k == "graftc"}},
        "target": request.target.name if request.target else "none named",
        "opset": {"version": request.opset.version, "why": request.opset.why},
        "precision": {
            "type": request.precision,
            "tolerance": TOLERANCE[request.precision],
            "islands": dict(choice.islands),
            "error": choice.error,
            "region_errors": dict(choice.errors),
        },
        "inputs": config["inputs"],
        "outputs": config["outputs"],
        "facts": config["facts"],
        "dynamic": {
            p.asked.name: {
                "declared": f"{p.asked.low}:{p.asked.usual}:{p.asked.high}",
                "proved": p.text(),
                "verified": sorted({c.sizes[p.asked.name] for c in cases}),
                "in": [f"{n}[{i}]" for n, i in p.places],
            }
            for p in proofs
        },
        "golden": {
            "drawn": "by the Task from DATA" if given.drawn else "random: no DATA was named",
            "cases": [c.name for c in cases],
            "timesteps": sorted({t for c in cases for t in c.timesteps}),
            "still_regions": still,
        },
        "regions": [
            {
                "path": r.path,
                "operator": r.operator,
                "rule": r.rule,
                "nodes": graph.nodes.get(r.path, 0),
                "parameters": r.parameters,
                "moves_output": round(moves[r.path], 6) if r.path in moves else None,
            }
            for r in regions
            if graph.nodes.get(r.path) or r.path in graph.values
        ],
        "weights": dict(graph.weights),
        "repairs": dict(graph.repairs),
    }  # fmt: skip


def _rungs(cases: Sequence[Case], support: Mapping[str, Any]) -> dict[str, Any]:
    """What the export itself checked, as the manifest says it; `graftc verify` puts its own in place of these."""
    sizes = (
        "; ".join(", ".join(f"{k}={v}" for k, v in c.sizes.items()) for c in cases) or "all fixed"
    )
    operators = support["operators"]
    lacks = ", ".join(u["operator"] for u in operators["unsupported"])
    found = [
        (TRACED, "PASS", sizes),
        ("TensorRT operators", operators["state"], lacks or operators["source"]),
        ("every other rung", "NOT RUN", "run `graftc verify` on this directory"),
    ]
    return {"by": "graftc export", "found": [dict(zip(RUNG, r, strict=True)) for r in found]}


def _write_index(
    folder: Path,
    request: Request,
    graph: Graph,
    regions: Sequence[Region],
    cases: Sequence[Case],
    names: Sequence[str],
    outside: Mapping[str, Any] | None,
) -> None:
    """What `verify.py` needs, as JSON: Python reads it without a package."""
    named = {"model.onnx": folder / "model.onnx"}
    data = folder / "model.onnx.data"
    if data.is_file():
        named[data.name] = data
    for path in sorted((folder / "golden").rglob("*.npz")):
        named[str(path.relative_to(folder))] = path
    index = {
        "model": "model.onnx",
        "precision": request.precision,
        "tolerance": TOLERANCE[request.precision],
        "opset": request.opset.version,
        "parameters": sum(r.parameters for r in regions),
        "outputs": list(names),
        "outside": dict(outside) if outside else None,
        "cases": [c.to_dict() for c in cases],
        "regions": [
            {"path": r.path, "rule": r.rule, "values": list(graph.values.get(r.path, ()))}
            for r in _in_order(regions, graph)
        ],
        "sha256": {name: files.file_hash(path) for name, path in named.items()},
    }
    (folder / "golden" / "golden.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _in_order(regions: Sequence[Region], graph: Graph) -> list[Region]:
    """In the order in which the graph computes them."""
    order = {path: i for i, path in enumerate(graph.values)}
    return sorted(
        (r for r in regions if r.path != WHOLE), key=lambda r: order.get(r.path, len(order))
    )


def _outside(
    model: nn.Module,
    config: Mapping[str, Any],
    request: Request,
    proofs: Sequence[Proof],
    given: Source,
) -> dict[str, Any] | None:
    """One shape that must be refused: beyond an end that the model has itself, or another size where one is fixed."""
    usual = {r.name: r.usual for r in request.ranges}
    for proof in proofs:
        if proof.high is not None and proof.places:
            name, axis = proof.places[0]
            try:
                with torch.no_grad():
                    model(**given.draw({**usual, proof.asked.name: proof.high + 1}, 0))
            except (RuntimeError, IndexError, ValueError):
                return {"input": name, "axis": axis, "size": proof.high + 1}
    for port in config["inputs"]:
        for axis in reversed(range(len(port["shape"]))):
            if not isinstance(port["shape"][axis], str):
                return {"input": port["name"], "axis": axis, "size": 2 * int(port["shape"][axis])}
    return None
