"""A traced student as an ONNX graph in which every node and weight leads back to where it came from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import onnx_ir as ir
import torch
from torch import Tensor, nn

from graftc.deploy.regions import WHOLE, Region, Traced, region_of, site_of, trace
from graftc.deploy.repair import repair
from graftc.deploy.shapes import dynamic_shapes
from graftc.deploy.translations import translations
from graftc.emit.onnx import output_names, quiet, refused

_MARK = "graftc-region:"


@dataclass(frozen=True)
class Graph:
    """An exported model before it is saved: its regions' values and nodes, the names of its weights."""

    program: Any
    values: Mapping[str, tuple[str, ...]]
    nodes: Mapping[str, int]
    weights: Mapping[str, dict[str, Any]]
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
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=opset, verbose=False, dynamic_shapes=shapes,
                input_names=list(inputs), output_names=_names(names, exported, counts),
                custom_translation_table=translations(),
            )  # fmt: skip
    except Exception as error:
        raise refused(error, model, dict(inputs), shapes) from error
    assert program is not None
    found = program.model
    values = _take_regions(found, counts)
    repairs = repair(found)
    _clean(found)
    weights = _name_weights(found, model)
    nodes = _name_nodes(found, sites)
    return Graph(program, _value_names(values), nodes, weights, dict(repairs))


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


def _name_weights(model: ir.Model, module: nn.Module) -> dict[str, dict[str, Any]]:
    """Give folded weights their names back; returns ONNX name → the state's name and whether it is transposed.

    The optimiser folds the transposition of a linear layer's weight into a new constant with a name of
    its own; such a one is known by its shape and its numbers.
    """
    state: dict[str, Tensor] = {
        **dict(module.named_buffers(remove_duplicate=False)), **dict(module.named_parameters(remove_duplicate=False))
    }  # fmt: skip
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            by_shape.setdefault(tuple(tensor.shape), []).append(name)
    table: dict[str, dict[str, Any]] = {}
    taken = {str(n) for n in model.graph.initializers}
    for name, value in list(model.graph.initializers.items()):
        if name in state:
            table[name] = {"source": name}
            continue
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
            continue
        numbers = tensor.numpy()
        shape = tuple(int(s) for s in numbers.shape)
        source = next(
            (n for n in by_shape.get(shape[::-1], []) if f"{n}.T" not in taken and _same(state[n], numbers)), None
        )  # fmt: skip
        if source is not None:
            value.name = f"{source}.T"
            taken.add(f"{source}.T")
            table[f"{source}.T"] = {"source": source, "transposed": True}
    return table


def _same(tensor: Tensor, transposed: Any) -> bool:
    """Whether an array is a tensor's transpose: a row first, which settles nearly all."""
    own = tensor.detach()
    if own.dtype == torch.bfloat16:
        theirs = torch.from_numpy(numpy.ascontiguousarray(transposed).view(numpy.int16)).view(
            torch.bfloat16
        )
    else:
        theirs = torch.from_numpy(numpy.ascontiguousarray(transposed))
    if theirs.dtype != own.dtype:
        return False
    return bool(torch.equal(own[:, 0], theirs[0])) and bool(torch.equal(own.T, theirs))


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
