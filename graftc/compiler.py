"""Compile: a file and a model become a build. Each step is one function from value to value."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftc import __version__
from graftc.diagnostics import Diagnostic, fail, render
from graftc.distillation.about import Noise, noise_of
from graftc.distillation.targets import Targets
from graftc.distillation.targets_file import to_dict
from graftc.emit.build import Build, write_build
from graftc.emit.files import file_hash
from graftc.forms import forms
from graftc.language.check import check
from graftc.language.rules import Rules
from graftc.measures import DEFAULT_SAMPLES, Measuring
from graftc.operators.spec import CPU, Machine
from graftc.program.analysis import Analysis, Site, analyse
from graftc.program.capture import capture
from graftc.program.given_weights import load_weights, weights_hash
from graftc.program.libraries import LibraryReference
from graftc.program.model import Model, Reference, as_model, load_model, model_reference, source_of
from graftc.program.modes import captured
from graftc.program.parts import PartRef, part_refs
from graftc.program.program import Program
from graftc.rewrite.apply import Patch, apply, undo
from graftc.rewrite.candidates import OPERATOR, candidate_path, candidate_programs
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.exact import check_exact
from graftc.rewrite.plan import Plan, make_plan
from graftc.rewrite.plan_text import plan_dict
from graftc.rewrite.price import init_clause
from graftc.rewrite.repeat import Round, round_texts, run_repeated, undo_rounds
from graftc.rewrite.user_files import bind
from graftc.selectors import asks, measured_for, measuring
from graftc.targets import make_targets
from graftc.weights.initialise import initialise
from graftc.weights.parts import Affine, Heads
from graftc.weights.released import load_student, read_state


@dataclass(frozen=True, eq=False)
class Compiled:
    """Everything that compiling a file on a model gives, in memory.

    >>> import graftc.compiler as c, torch
    >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> model = Model(torch.nn.Sequential(layer), {"input": torch.zeros(2, 3, 4)})
    >>> rules = check("rule wide {\\n match m = mlp\\n replace m with mlp(ratio = 4)\\n}")
    >>> c.compile_model(rules, model).plan.parameters
    (76, 148)
    """

    analysis: Analysis
    plan: Plan
    student: Program
    patch: Patch
    targets: Targets
    checks: tuple[str, ...]
    rounds: tuple[Round, ...] = ()

    @property
    def teacher(self) -> Program:
        return self.analysis.program


def compile_model(
    rules: Rules,
    model: Model,
    seed: int = 0,
    measuring: Measuring | None = None,
    machine: Machine = CPU,
) -> Compiled:
    """Capture, analyse, measure, plan, apply, initialise, check exact rules. Raises GraftError.

    `measuring`: what measured selectors are measured on, where the rules have any. `machine`: where the student is
    to run, which its operators' forms are chosen by.
    """
    return compile_analysis(rules, analyse(captured(model)), model, seed, measuring, machine)


def compile_analysis(
    rules: Rules,
    analysis: Analysis,
    model: Model,
    seed: int = 0,
    measuring: Measuring | None = None,
    machine: Machine = CPU,
) -> Compiled:
    """As `compile_model`, of a model that is captured and analysed already. `analysis` is left as it was."""
    analysis = measured_for(rules, analysis, measuring)
    plan = make_plan(rules, analysis, machine)
    student, patch = apply(analysis.program, plan.edits)
    initialise_new(plan, analysis, student, seed)
    checks = check_exact(plan, analysis, model, lambda p, s: initialise_new(p, analysis, s, seed))
    repeated = [r for r in rules.rules if r.repeat is not None]
    student, rounds = run_repeated(
        repeated, student, fill=lambda edits, of, made: fill_new(edits, of, made, seed)
    )
    targets = make_targets(plan, analysis.program)
    checks = (*checks, *round_texts(rounds))
    return Compiled(analysis, plan, student, patch, targets, checks, rounds)


def undone(compiled: Compiled) -> Program:
    """The original, bit for bit, made from the student by undoing every edit."""
    return undo(undo_rounds(compiled.student, compiled.rounds), compiled.patch)


def initialise_new(plan: Plan, analysis: Analysis, student: Program, seed: int) -> None:
    """Give every new operator its first weights, in place, from the teacher's parts."""
    fill_new(plan.edits, analysis, student, seed)


def fill_new(edits: Iterable[Edit], analysis: Analysis, student: Program, seed: int) -> None:
    """The first weights of edits that were made on `analysis`, in place."""
    for edit in edits:
        for new in edit.new:
            if new.copied is None:  # a copy has its weights as soon as it is made
                _initialise(edit, new, student.module(new.path), analysis, seed)


def candidates(plan: Plan, analysis: Analysis, seed: int) -> dict[str, Program]:
    """The candidates of `one of` that are not in the student, initialised: folder in the build → model."""
    found: dict[str, Program] = {}
    for edit in plan.edits:
        for index, new, program in candidate_programs(edit, analysis.program):
            _initialise(edit, new, program.module(OPERATOR), analysis, seed)
            found[candidate_path(edit, index)] = program
    return found


def _initialise(
    edit: Edit, new: NewModule, module: nn.Module, analysis: Analysis, seed: int
) -> None:
    clause = init_clause(edit, new, analysis)
    initialise(
        module,
        new.spec,
        new.arguments,
        new.role,
        clause.sources,
        parts={n: site_parts(analysis, s) for n, s in clause.sites.items()},
        heads={n: h for n, s in clause.sites.items() if (h := _heads(s)) is not None},
        path=new.path,
        binding=clause.binding,
        seed=seed,
        spans=clause.spans,
    )


def site_parts(analysis: Analysis, site: Site) -> Mapping[str, Affine]:
    """The affine parts of a site; what is not affine is absent, and asking for it is an error there."""
    refs = part_refs(analysis, site.path)
    return {
        name: Affine(*ref.tensors(analysis.program))
        for name, ref in refs.items()
        if isinstance(ref, PartRef)
    }


def _heads(site: Site) -> Heads | None:
    values = [site.facts.get(n) for n in ("heads", "kv_heads", "head_dim")]
    if all(isinstance(v, int) for v in values):
        return Heads(*values)  # type: ignore[arg-type]
    return None


def compile_build(
    file: Path,
    model: str | Model,
    output: Path,
    *,
    data: Any,
    task: Any,
    overrides: Mapping[str, str],
    seed: int,
    copy_teacher: bool,
    command: str,
    weights: Path | None = None,
    student_weights: Path | None = None,
    allow_python: Sequence[str | Path] = (),
    samples: int = DEFAULT_SAMPLES,
    cache: Path | None = None,
    machine: Machine = CPU,
) -> Build:
    """Compile and write the build directory; see `graftc.compile`."""
    rules = bind(check(file, overrides), allow_python)
    loaded = _loaded(model, weights, rules)
    check_weights(loaded.module)
    on = (
        measuring(loaded, data, task, samples=samples, seed=seed, cache=cache)
        if asks(rules)
        else None
    )
    compiled = compile_model(rules, loaded, seed, on, machine)
    targets, student, plan = compiled.targets, compiled.student, plan_dict(compiled.plan)
    fitted: tuple[Diagnostic, ...] = ()
    if student_weights is not None:
        student = _released(student, student_weights, loaded.module)
        plan = _from_file(plan, student_weights)
        targets = replace(targets, sites=tuple(replace(s, pending=()) for s in targets.sites))
    elif data is not None and any(s.pending for s in targets.sites):
        targets, fitted = _solve(compiled, data, task, loaded, seed)
    targets = replace(targets, noise=_noise(task if task is not None else loaded.task))
    return write_build(
        output,
        student=student,
        teacher=compiled.teacher,
        candidates=candidates(compiled.plan, compiled.analysis, seed),
        plan=plan,
        targets=to_dict(targets),
        manifest={
            "versions": _versions(),
            "command": command,
            "seed": seed,
            "rules": {"file": str(file), "read": list(rules.files), "sha256": rules.digest,
                      "python": dict(rules.python), "parameters": dict(rules.parameters)},
            "model": _named(model, "MODEL"),
            "model_weights": _weights_entry(weights),
            "student_weights": _file_entry(student_weights),
            "data": _named(data, "DATA"),
            "task": _task_entry(task, loaded.task),
            "checks": list(compiled.checks),
            "notes": [render(n) for n in (*compiled.plan.notes, *fitted)],
            "forms": forms(compiled.plan, compiled.analysis, student, loaded),
        },
        copy_teacher=copy_teacher or not isinstance(model, str),
        provenance={n.path: f"{e.rule.name} @ {e.origin}" for e in compiled.plan.edits for n in e.new},
        model=model_reference(model).absolute() if isinstance(model, str) else "",
        model_weights="" if weights is None else str(weights.absolute()),
        made_by=f"graftc {__version__} from {file.name}",
    )  # fmt: skip


def _loaded(model: str | Model, weights: Path | None, rules: Rules) -> Model:
    """The model with its weights. Where they are read from files, the rules are planned first, on the meta
    device: what does not fit is said before gigabytes are read."""
    if not isinstance(model, str):
        if weights is not None:
            load_weights(as_model(model).module, weights)
        return as_model(model)
    deferred = weights is not None or isinstance(model_reference(model), LibraryReference)
    if deferred and not asks(rules):
        make_plan(rules, analyse(capture(load_model(model, on_meta=True, weights=weights))))
    return load_model(model, weights=weights)


def _weights_entry(weights: Path | None) -> dict[str, str] | None:
    if weights is None:
        return None
    return {
        "reference": str(weights),
        "absolute": str(weights.absolute()),
        "sha256": weights_hash(weights),
    }


def _released(student: Program, file: Path, original: nn.Module) -> Program:
    """The student with the weights of `file`, in memory of its own: what no edit touched is the teacher's."""
    made = replace(student, root=copy.deepcopy(student.root))
    constants = made.root.state_dict().keys() - original.state_dict().keys()
    constants -= {name for name, _ in made.root.named_parameters()}
    load_student(made.root, read_state(file), constants)
    return made


def _from_file(plan: dict[str, Any], file: Path) -> dict[str, Any]:
    """The plan with every new weight's origin being the file."""
    edits = [
        {**e, "weights": [{**w, "from": file.name, "pending": False} for w in e["weights"]]}
        for e in plan["edits"]
    ]
    return {**plan, "edits": edits}


def _file_entry(file: Path | None) -> dict[str, str] | None:
    if file is None:
        return None
    return {"reference": str(file), "absolute": str(file.absolute()), "sha256": file_hash(file)}


def check_weights(module: nn.Module) -> None:
    """Raises GraftError for weights that are not there (G206) or not finite (G207)."""
    meta = next((n for n, p in module.named_parameters() if p.is_meta), None)
    if meta is not None:
        fail(
            "G206",
            f"`{meta}` is on the meta device: the model has no weights",
            site="MODEL",
            help="load the weights in the MODEL function",
        )
    for name, tensor in module.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            fail("G207", f"`{name}` holds values that are not finite", site="MODEL")
    for name, tensor in module.named_buffers():  # a buffer of -inf is a mask
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            fail("G207", f"`{name}` holds values that are no numbers", site="MODEL")


def _solve(
    compiled: Compiled, data: Any, task: Any, model: Model, seed: int
) -> tuple[Targets, tuple[Diagnostic, ...]]:
    """First weights that need data, solved on the teacher's activations."""
    from graftc.distillation.first_weights import solve_first_weights
    from graftc.loading import load_data, load_task

    chosen = load_task(task if task is not None else model.task)
    if chosen is None:
        fail(
            "G231",
            "DATA was given, and no task that draws the model's inputs from it",
            site="-d",
            help="give -t ddpm, -t file.py:Task, or return graftc.Model(…, task = …)",
        )
    return solve_first_weights(
        compiled.targets,
        compiled.teacher.root,
        compiled.student.root,
        load_data(data),
        chosen,
        seed=seed,
    )


def _noise(task: Any) -> Noise | None:
    """What makes the batches; None where compile was told of no task."""
    from graftc.loading import load_task

    return None if task is None else noise_of(load_task(task))


def _named(what: Any, kind: str) -> dict[str, str] | None:
    if not isinstance(what, str):
        return None
    named = model_reference(what) if kind == "MODEL" else Reference(what, kind)
    return {"reference": what, "absolute": named.absolute(), "sha256": named.source_hash()}


def _task_entry(task: Any, own: Any) -> dict[str, str] | None:
    """A shipped task by its name, the user's by its file, an object (the model's own, too) by its class."""
    chosen = own if task is None else task
    if isinstance(chosen, str):
        return (
            _named(chosen, "TASK") if ":" in chosen else {"reference": chosen, "absolute": chosen}
        )
    return None if chosen is None else source_of(chosen)


def _versions() -> dict[str, str]:
    return {
        "graftc": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{
            p: metadata.version(p)
            for p in ("lark", "networkx", "safetensors", "onnx", "onnxscript")
        },
    }
