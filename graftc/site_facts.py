"""What targets say of a site beside how to train it, read off a plan's step: see `graftc.distillation.about`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graftc.distillation.about import FirstWeight, PerSample
from graftc.distillation.targets import Cut
from graftc.program.analysis import batch_size
from graftc.program.program import Program, size_hint, value
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.price import Step
from graftc.weights.initialise import Origin


def first_weights(edit: Edit, origins: Iterable[Origin]) -> tuple[FirstWeight, ...]:
    """Origins with the rule's bindings written as module paths: `concat(a.q, …)` is `concat(blocks.1.attn.q, …)`."""
    paths = {name: site.path for name, site in edit.match.bindings.items()}
    names = re.compile(rf"\b({'|'.join(map(re.escape, paths))})\b(?=[.)])") if paths else None

    def said(text: str) -> str:
        return names.sub(lambda m: paths[m.group(1)], text) if names else text

    return tuple(FirstWeight(o.parameter, said(o.text), o.pending, o.rows) for o in origins)


def arguments_of(edit: Edit, new: NewModule | None = None) -> dict[str, Any]:
    """All arguments of the one operator, or of each new module by its path; `new`: of a candidate."""
    chosen = edit.new if new is None else (new,)
    if len(chosen) == 1:
        return dict(chosen[0].arguments)
    return {n.path: {"operator": n.spec.name, **n.arguments} for n in chosen}


def definition_of(edit: Edit, new: NewModule | None = None) -> str:
    """What computes: the operators' classes, or a hash of one that is written in a file; and how they join.

    Of a class in a Python file, that file is hashed; what it imports is not.
    """
    chosen = edit.new if new is None else (new,)
    parts = [_definition(n) for n in chosen]
    if edit.kind != "replace":
        options = ", ".join(f"{k} = {v}" for k, v in sorted(edit.options.items()))
        parts.insert(0, f"{edit.kind}({', '.join(edit.branches)}; {edit.merge}; {options})")
    return " + ".join(parts) or edit.kind


def _definition(new: NewModule) -> str:
    if new.copied is not None:
        return f"copy({new.copied.source}; zero {', '.join(r.weight for r in new.copied.zero)})"
    if (written := new.spec.written) is not None:
        text = repr((written.inputs, written.steps, written.returns))
        return f"{new.spec.name} sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if (user := new.spec.user) is not None:
        return f"{user.name} sha256:{hashlib.sha256(user.file.read_bytes()).hexdigest()[:32]}"
    return new.spec.module


def per_sample(step: Step, cut: Cut, learned: Iterable[Step], program: Program) -> PerSample:
    """Bytes of the cut's values and FLOPs of the two regions, a sample; `learned` are all steps with targets."""
    before, after = step.before.flops, step.after.flops
    if step.edit.kind != "replace":
        regions = step.edit.sites if step.edit.region is None else (step.edit.region,)
        before = sum(_flops(site.facts) for site in regions)
        inner = sum(
            other.after.flops - other.before.flops
            for other in learned
            if other is not step
            and all(any(s.path.startswith(f"{r.path}.") for r in regions) for s in other.edit.sites)
        )
        after += before + inner
    return PerSample(cut_bytes(cut, program), before, after)


def _flops(facts: Mapping[str, Any]) -> int:
    found = facts.get("flops")
    return found if isinstance(found, int) else 0


def cut_bytes(cut: Cut, program: Program) -> int:
    """Bytes of a cut's values for one sample, at the example's sizes; what has no batch counts whole."""
    graph = program.module(cut.graph)
    assert isinstance(graph, fx.GraphModule)
    inside = f"{cut.graph}." if cut.graph else ""
    calls = {f"{inside}{n.target}": n for n in graph.graph.nodes if n.op == "call_module"}
    batch = batch_size(program)
    values: list[Any] = [value(calls[cut.output])]
    for given in cut.inputs:
        call = calls[given.call]
        argument = (
            call.args[given.argument]
            if isinstance(given.argument, int)
            else call.kwargs[given.argument]
        )
        assert isinstance(argument, fx.Node)
        values.append(value(argument))
    return sum(_bytes(v, batch) for v in values)


def _bytes(found: Any, batch: int) -> int:
    if isinstance(found, (tuple, list)):
        return sum(_bytes(part, batch) for part in found)  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(found, torch.Tensor):
        return 0
    sizes = [size_hint(s) for s in found.shape]
    total = found.element_size()
    for size in sizes:
        total *= size
    return total // batch if sizes and sizes[0] % batch == 0 else total
