"""Where the time goes: ONNX Runtime's profile by region and by rule, and two exports side by side."""

from __future__ import annotations

import importlib
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from graftc.deploy.directory import Export
from graftc.deploy.scripts.verify import Export as Files
from graftc.deploy.scripts.verify import NoExport, first_line, run, session
from graftc.diagnostics import Diagnostic, NotRunError, fail

_WARM, _RUNS, _PROFILED = 2, 20, 10


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call at the usual shape: the fastest, and the median; and where they go, as shares."""

    path: Path
    milliseconds: float
    median: float
    regions: Mapping[str, float]
    rules: Mapping[str, float]
    attributed: float


@dataclass(frozen=True)
class Comparison:
    """Two exports measured in turns on the same inputs; `ratio` is of the fastest calls, which noise moves least."""

    ours: Timing
    other: Timing

    @property
    def ratio(self) -> float:
        return self.ours.milliseconds / self.other.milliseconds

    @property
    def median_ratio(self) -> float:
        return self.ours.median / self.other.median


def bench(
    export: Export,
    against: Export,
    *,
    regions: bool = False,
    threads: int = 2,
    rounds: int = _RUNS,
    clock: Callable[[], float] = time.perf_counter,
    spinning: bool = True,
) -> Comparison:
    """Measure two exports in ONNX Runtime on the CPU, in turns. Raises GraftError, exit code 3 without it.

    `clock`: seconds; on a machine that others use, `time.process_time` and threads that wait without `spinning`:
    the CPU time of all of them, in which no other process has a part.
    """
    sessions = [_open(e, threads, spinning) for e in (export, against)]
    times: list[list[float]] = [[], []]
    for i in range(_WARM + rounds):
        for (files, made, inputs), kept in zip(sessions, times, strict=True):
            start = clock()
            run(made, inputs, files.cases[0]["outputs"])
            if i >= _WARM:
                kept.append(1e3 * (clock() - start))
    shares = [_profile(e, threads) if regions else ({}, {}, 0.0) for e in (export, against)]
    ours, other = (
        Timing(e.path, min(t), statistics.median(t), *s)
        for e, t, s in zip((export, against), times, shares, strict=True)
    )
    return Comparison(ours, other)


def _open(export: Export, threads: int, spinning: bool) -> tuple[Files, Any, dict[str, Any]]:
    try:
        files = Files(export.path)
    except NoExport as error:
        fail("G667", str(error), site=str(export.path), help="export the build again")
    try:
        extra = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "01"[spinning]}
        made = session(str(export.model), extra=extra)
    except ImportError as error:
        raise NotRunError(
            Diagnostic(
                "G641",
                "onnxruntime is not installed",
                site="bench",
                help='pip install "graftc[cpu]"',
            )
        ) from error
    except Exception as error:  # the runtime's own error classes are not public
        raise NotRunError(
            Diagnostic(
                "G671", f"ONNX Runtime does not run it: {first_line(error)}", site=str(export.model)
            )
        ) from error
    return files, made, files.load(files.cases[0], "inputs")


def _profile(export: Export, threads: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Shares of the time in nodes by region, by rule, and the share that could be attributed at all."""
    files = Files(export.path)
    with tempfile.TemporaryDirectory(prefix="graftc-bench-") as folder:
        optimised, events = _events(export, files, threads, Path(folder))
    plain = onnx.load(str(export.model), load_external_data=False)
    where = regions_of_nodes(plain, optimised)
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            spent[where.get(str(event["name"]).removesuffix("_kernel_time"), "")] += event["dur"]
    total = sum(spent.values()) or 1
    rule_of = {r["path"]: r["rule"] for r in files.about["regions"]}
    rules: Counter[str] = Counter()
    for region, micro in spent.items():
        rules[rule_of.get(region, "") or ("as it was" if region else "not attributed")] += micro
    by_region = {r or "not attributed": n / total for r, n in spent.most_common()}
    return by_region, {r: n / total for r, n in rules.most_common()}, 1 - spent.get("", 0) / total


def _events(
    export: Export, files: Files, threads: int, folder: Path
) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """The graph as the runtime optimised it, every node with a name of its own, and the profile of that graph.

    A profile calls a node by its name, and the runtime gives none to the nodes of a function that it writes out
    (Gelu in half precision): so its own graph is written, named, and run as it is.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    own, named = folder / "optimised.onnx", folder / "named.onnx"
    beside = "session.optimized_model_external_initializers_"
    session(
        str(export.model),
        extra={
            "intra_op_num_threads": threads, "optimized_model_filepath": str(own),
            f"{beside}file_name": "optimised.data", f"{beside}min_size_in_bytes": "1024",
        },
    )  # fmt: skip
    optimised = onnx.load(str(own), load_external_data=False)
    for i, node in enumerate(optimised.graph.node):
        node.name = f"{i}:{node.name}"
    named.write_bytes(optimised.SerializeToString())
    made = session(
        str(named),
        extra={
            "intra_op_num_threads": threads, "graph_optimization_level": runtime.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "enable_profiling": True, "profile_file_prefix": str(folder / "profile"),
        },
    )  # fmt: skip
    inputs = files.load(files.cases[0], "inputs")
    for _ in range(_PROFILED):
        run(made, inputs, files.cases[0]["outputs"])
    return optimised, json.loads(Path(made.end_profiling()).read_text())


def regions_of_nodes(plain: onnx.ModelProto, optimised: onnx.ModelProto) -> dict[str, str]:
    """Node of the optimised graph (`number:name`) → its region.

    The runtime fuses and inserts nodes: one under no name of ours has the region of the node that computed the
    same value before; else that of the nodes that use what it computes, for it was put there for them (a cast, a
    step inside of a function); else that of those that it uses.
    """
    regions = {
        n.name: next((p.value for p in n.metadata_props if p.key == "graftc.region"), "")
        for n in plain.graph.node
    }
    longest = sorted({r for r in regions.values() if r}, key=len, reverse=True)
    by_value = {o: regions[n.name] for n in plain.graph.node for o in n.output}
    nodes = list(optimised.graph.node)
    makers = {o: n.name for n in nodes for o in n.output}
    users: dict[str, list[str]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node.name)
    found: dict[str, str] = {}
    for node in nodes:
        name = node.name.partition(":")[2]
        own = regions.get(name) or next((r for r in longest if name.startswith(f"{r}/")), "")
        found[node.name] = own or next((by_value[o] for o in node.output if o in by_value), "")
    # Nodes stand in the order in which they are computed: one pass back, then one on for what nothing known uses.
    for node in reversed(nodes):
        used = (found[u] for o in node.output for u in users.get(o, ()))
        found[node.name] = found[node.name] or next(filter(None, used), "")
    for node in nodes:
        feeds = (found[makers[i]] for i in node.input if i in makers)
        found[node.name] = found[node.name] or next(filter(None, feeds), "")
    return found
