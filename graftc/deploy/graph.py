"""A traced student as an ONNX graph in which every node and weight leads back to where it came from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from graftc.deploy.regions import WHOLE, Region, Traced, region_of, site_of, trace
from graftc.deploy.repair import repair
from graftc.deploy.shapes import dynamic_shapes
from graftc.deploy.translations import translations
from graftc.diagnostics import GraftError
from graftc.emit.onnx import output_names, quiet, refused
from graftc.emit.purity import check_pure

_MARK = "graftc-region:"
_SMALL = 1024
"""Elements up to which onnxscript's optimiser compares weights with each other."""


@dataclass(frozen=True)
class Graph:
    """An exported model before it is saved: its regions' values and nodes, the names of its weights."""

    program: Any
    values: Mapping[str, tuple[str, ...]]
    nodes: Mapping[str, int]
    weights: Mapping[str, str | None]
    repairs: Mapping[str, int]

    @property
    def model(self) -> ir.Model:
        return self.program.model


def build_graph(
    model: nn.Module,
    config: Mapping[str, Any],
    regions: Sequence[Region],
    inputs: Mapping[str, Tensor],
    places: Mapping[str, Sequence[tuple[str, int]]],
    dims: Mapping[str, Any],
    opset: int,
    traced: Traced | None = None,
) -> Graph:
    """Export `model` as ONNX, name its nodes by region, and find each region's outputs among its values.

    `traced`: the traced model, where there is one already. Raises GraftError for an operator that ONNX lacks,
    with its site.
    """
    sites: Mapping[str, str] = config.get("provenance", {})
    shapes = dynamic_shapes(inputs, places, dims)
    names = output_names(config)
    try:
        with torch.no_grad(), quiet():
            if traced is None:
                traced = trace(model, inputs, shapes, [r.path for r in regions])
            exported, counts = traced
            with withheld(exported) as weights:
                program = torch.onnx.export(
                    exported, dynamo=True, opset_version=opset, verbose=False, dynamic_shapes=shapes,
                    input_names=list(inputs),
                    custom_translation_table=translations(), optimize=False,
                )  # fmt: skip
                assert program is not None
                assert program.exported_program is not None
                check_pure(program.exported_program, sites)
                _optimise(program.model, weights)
    except GraftError:
        raise
    except Exception as error:
        raise refused(error, model, dict(inputs), shapes, sites) from error
    found = program.model
    for value, name in zip(found.graph.outputs, _names(names, exported, counts), strict=True):
        value.name = name
    for value, name in zip(found.graph.inputs, inputs, strict=True):
        value.name = name  # the exporter renames an input that is an output as well
    # References, not copies: each tensor is read from the model when it is written to the file.
    program.apply_weights({n: t for n, t in weights.items() if n in found.graph.initializers})
    values = _take_regions(found, counts)
    repairs = repair(found)
    _clean(found)
    nodes = _name_nodes(found, sites)
    return Graph(program, _value_names(values), nodes, _weights(found, weights), dict(repairs))


@contextmanager
def withheld(exported: torch.export.ExportedProgram) -> Generator[dict[str, Tensor]]:
    """Fake tensors in place of a traced model's weights: the exporter knows their shapes and cannot copy them.

    Gives the real weights by name; they are back in the traced model when the block ends. Those that rules of
    the optimiser read stay real: vectors, convolutions, small ones, and all where there is a batch norm.
    """
    state = exported.state_dict
    places = {
        str(spec.target): spec.arg.name
        for spec in exported.graph_signature.input_specs
        if spec.target in state and state[spec.target].is_floating_point()
    }
    real = {name: state[name] for name in places}
    fakes = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    if not any("batch_norm" in str(n.target) for n in exported.graph.nodes):
        for name, tensor in real.items():
            if tensor.ndim == 2 and tensor.numel() > _SMALL:
                fake = fakes[places[name]]
                state[name] = (
                    nn.Parameter(fake, False)
                    if name in exported.graph_signature.parameters
                    else fake
                )
    try:
        yield real
    finally:
        state.update(real)


def _optimise(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """What the exporter itself would do, but for folding weights: they keep their names and their layout."""
    from onnxscript.optimizer import optimize_ir
    from onnxscript.rewriter import onnx_fusions

    def foldable(node: ir.Node) -> bool | None:
        return False if any(v is not None and v.name in weights for v in node.inputs) else None

    optimize_ir(model, should_fold=foldable)
    onnx_fusions.fuse(model)


def _names(own: list[str] | None, exported: Any, counts: Mapping[str, int]) -> list[str]:
    marks = [f"{_MARK}{path}:{i}" for path, count in counts.items() for i in range(count)]
    total = len(exported.graph_signature.user_outputs)
    count = total - len(marks)
    if own is None or len(own) != count:
        own = [f"output_{i}" for i in range(count)]
    return [*own, *marks]


def _take_regions(model: ir.Model, counts: Mapping[str, int]) -> dict[str, list[ir.Value]]:
    """The regions' values, which are outputs of the graph no longer."""
    marked = {v.name: v for v in model.graph.outputs if str(v.name).startswith(_MARK)}
    kept = [v for v in model.graph.outputs if not str(v.name).startswith(_MARK)]
    found: dict[str, list[ir.Value]] = {}
    for path, count in counts.items():
        for i in range(count):
            found.setdefault(path, []).append(marked[f"{_MARK}{path}:{i}"])
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    for values in found.values():
        for i, value in enumerate(values):
            values[i] = _behind(model, value)
    for path, values in found.items():
        for i, value in enumerate(values):
            if value.producer() is not None and str(value.name).startswith(_MARK):
                value.name = f"{path}/out{i if len(values) > 1 else ''}"
    return found


def _behind(model: ir.Model, value: ir.Value) -> ir.Value:
    """The value that the graph itself uses, where the exporter put a copy or a cast before the output."""
    node = value.producer()
    while node is not None and node.op_type in ("Identity", "Cast") and not value.uses():
        source = node.inputs[0]
        if value.is_graph_output() or source is None or source.producer() is None:
            break
        model.graph.remove(node, safe=True)
        value, node = source, source.producer()
    return value


def _value_names(values: Mapping[str, list[ir.Value]]) -> dict[str, tuple[str, ...]]:
    return {
        path: tuple(str(v.name) for v in found)
        for path, found in values.items()
        if all(v.producer() is not None and v.producer().graph is not None for v in found)  # pyright: ignore
    }


def _clean(model: ir.Model) -> None:
    """Nodes and weights that nothing uses any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def _weights(model: ir.Model, weights: Mapping[str, Tensor]) -> dict[str, str | None]:
    """The student's weights → their names in the file: their own, one with the same numbers, None for an unused one."""
    kept = {n: t for n, t in weights.items() if n in model.graph.initializers}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in kept.items():
        by_shape.setdefault(tuple(tensor.shape), []).append(name)
    found: dict[str, str | None] = {}
    for name, tensor in weights.items():
        alike = () if name in kept else by_shape.get(tuple(tensor.shape), ())
        same = next((n for n in alike if torch.equal(kept[n], tensor)), None)
        found[name] = name if name in kept else same
    return found


def _name_nodes(model: ir.Model, sites: Mapping[str, str]) -> dict[str, int]:
    """Name each node `region/Op_n`, with region, site, rule and line in its metadata; returns nodes by region."""
    count: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for node in model.graph:
        scopes = str(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        module = _module_path(re.findall(r"'([^']*)'", scopes)[:-1])
        region = region_of(module, sites)
        site = site_of(module, sites)
        count[region] += 1
        used[f"{region}/{node.op_type}"] += 1
        node.name = f"{region}/{node.op_type}_{used[f'{region}/{node.op_type}'] - 1}"
        for key in [k for k in node.metadata_props if k.startswith("pkg.")]:
            del node.metadata_props[key]  # paths of the machine that exported
        node.metadata_props["graftc.region"] = region
        if site is not None:
            rule, _, line = sites[site].partition(" @ ")
            node.metadata_props.update(
                {
                    "graftc.site": site,
                    "graftc.rule": sites[site],
                    "graftc.name": rule,
                    "graftc.line": line,
                }
            )
    return dict(count)


def _module_path(scopes: Sequence[str]) -> str:
    return scopes[-1] if scopes else ""


def describe_graph(graph: Graph, config: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """What the file was made from, in its metadata."""
    about = {k: config[k] for k in ("inputs", "outputs", "facts")}
    graph.model.metadata_props.update({**facts, "graftc.about": json.dumps(about, sort_keys=True)})
    graph.model.graph.name = str(config.get("model", WHOLE))
