"""From a plan to distillation targets: each learned edit becomes a pair of cuts.

The teacher's cut is the region that the edit rewires, the student's what stands in its place;
an edit inside another's region is distilled first.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from graftc.distillation.gates import gate_after
from graftc.distillation.targets import (
    Budget,
    Candidate,
    Cut,
    CutInput,
    Lora,
    Loss,
    ModelInput,
    Only,
    Pending,
    Site,
    Stage2,
    Targets,
)
from graftc.language import rules as language
from graftc.program import analysis
from graftc.program.program import Program
from graftc.rewrite import price
from graftc.rewrite.candidates import OPERATOR, candidate_path
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.plan import Plan
from graftc.rewrite.plan_text import after_text, operator_text
from graftc.rewrite.price import Step
from graftc.site_facts import arguments_of, definition_of, first_weights, per_sample
from graftc.weights.assign import present
from graftc.weights.initialise import Origin


def make_targets(plan: Plan, program: Program) -> Targets:
    """The targets of a plan on the original Program.

    An edit that is not learned has none, unless weights of it wait for data: then it is solved,
    and not trained.
    """
    learned = [s for s in plan.steps if _has_target(s)]
    return Targets(
        inputs=tuple(ModelInput(p.name, p.shape, p.dtype, p.meaning) for p in program.inputs),
        sites=tuple(_site(s, learned, program) for s in learned),
        stage2=_stage2(plan.finetune, plan),
    )


def _check_gate(cut: Cut, program: Program) -> None:
    """Refuse now what the capture of the teacher would refuse later (G552)."""
    graph = program.root.get_submodule(cut.graph)
    assert isinstance(graph, fx.GraphModule)
    inside = cut.output.removeprefix(f"{cut.graph}.") if cut.graph else cut.output
    call = next(n for n in graph.graph.nodes if n.op == "call_module" and n.target == inside)
    gate_after(call, cut.output)


def _has_target(step: Step) -> bool:
    edit = step.edit
    if _is_learned(step):
        return bool(edit.new or edit.candidates or edit.kind == "together")
    return any(o.pending for o in step.origins)


def _site(step: Step, learned: list[Step], program: Program) -> Site:
    edit = step.edit
    teacher, student = _cuts(edit, program)
    rule = edit.rule
    if rule.distill is not None and rule.distill.gate:
        teacher = replace(teacher, gate=True)
        _check_gate(teacher, program)
    trainable = _trainable(edit)
    return Site(
        name=edit.name,
        teacher=teacher,
        student=student,
        trainable=tuple(p for p in trainable if p),
        rule=rule.name,
        origin=edit.origin,
        operator=_operator(edit),
        pending=_pending(step.origins),
        loss=_loss(rule.distill),
        budget=_budget(rule.distill) if _is_learned(step) else Budget(steps=0),
        after=tuple(
            other.edit.name
            for other in learned
            if other is not step
            and any(
                inner.path.startswith(outer.path + ".")
                or (inner.path == outer.path and other.edit.rule.name in rule.after)
                for inner in other.edit.sites
                for outer in _region(edit)
            )
        ),
        exact=not trainable,
        candidates=tuple(
            _candidate(step, i, c, teacher, program) for i, c in enumerate(step.candidates)
        ),
        arguments=arguments_of(edit),
        definition=definition_of(edit),
        init=first_weights(edit, step.origins),
        sample=per_sample(step, teacher, learned, program),
        student_inputs=rule.distill.inputs if rule.distill is not None else (0.0, 0.0),
    )


def _of_group(new: NewModule, group: str, path: str | None = None) -> list[str]:
    """The parameters of a group that the operator's spec names (`distill …, train = feature_maps`).

    `path`: of the operator, where it is not its own (in a candidate's package).
    """
    root = new.path if path is None else path
    slots = [s for s in present(new.spec, new.arguments) if s.name in new.spec.groups[group]]
    paths = [".".join(p for p in (root, s.module, s.parameter) if p) for s in slots]
    return list(dict.fromkeys(paths))


def _region(edit: Edit) -> tuple[analysis.Site, ...]:
    """What an edit's cut is around: its sites, or the block that holds them."""
    return edit.sites if edit.region is None else (edit.region,)


def _trainable(edit: Edit) -> list[str]:
    """Prefixes of what stage 1 trains."""
    new = [n.path for n in edit.new]
    group = edit.rule.distill.train if edit.rule.distill is not None else None
    if group is not None and edit.new and group in edit.new[0].spec.groups:
        return _of_group(edit.new[0], group)
    if edit.rule.train_inserted or edit.kind not in ("parallel", "together"):
        return new
    stay = [s.path for s in edit.sites]
    return list(dict.fromkeys([*stay, *new]))


def _operator(edit: Edit) -> str:
    if edit.kind == "parallel":
        return edit.new[-1].spec.name
    return operator_text(edit.new[0]) if edit.new else after_text(edit)


def _pending(origins: tuple[Origin, ...], root: str = "") -> tuple[Pending, ...]:
    """The linears to solve, each once; paths in a candidate's own package begin at `root`."""
    found: dict[Pending, None] = {}
    for o in origins:
        if (fit := o.fit) is not None:
            inside = f"{o.module}." if o.module else ""
            module = o.parameter.removesuffix(f".{inside}{o.parameter.rpartition('.')[2]}")
            given = (fit.linear, fit.policy, fit.blocks, fit.sweeps)
            found[Pending(root or module, *given)] = None
    return tuple(found)


def _candidate(
    step: Step, index: int, candidate: price.Candidate, cut: Cut, program: Program
) -> Candidate:
    edit, new = step.edit, candidate.new
    if new is None:
        return Candidate("keep")
    own = replace(step, after=candidate.cost)
    about = Candidate(
        operator_text(new),
        inputs=("x", *new.inputs),
        arguments=arguments_of(edit, new),
        definition=definition_of(edit, new),
        init=first_weights(edit, candidate.origins),
        sample=per_sample(own, cut, (), program),
    )
    if index == 0:
        return about
    group = edit.rule.distill.train if edit.rule.distill is not None else None
    named = group is not None and group in new.spec.groups
    return replace(
        about,
        package=candidate_path(edit, index),
        pending=_pending(candidate.origins, OPERATOR),
        trainable=tuple(_of_group(new, group, OPERATOR)) if named and group else (OPERATOR,),
    )


def _is_learned(step: Step) -> bool:
    return step.edit.rule.contract == "learned"


def _cuts(edit: Edit, program: Program) -> tuple[Cut, Cut]:
    if edit.kind == "replace":
        return _replace_cuts(edit, program)
    if edit.region is not None:
        inputs = _region_inputs((edit.region,), edit.region.graph, program)
        same = Cut(edit.region.graph, inputs, edit.region.path)
        return same, same
    inputs = _region_inputs(edit.sites, edit.graph, program)
    return (
        Cut(edit.graph, inputs, edit.sites[-1].path),
        Cut(edit.graph, inputs, edit.new[-1].path),
    )


def _replace_cuts(edit: Edit, program: Program) -> tuple[Cut, Cut]:
    """One site becomes one operator: the stream, and whatever inputs any of the operators keeps.

    Where `keep` stands first the student's cut is the site as it is, with all that its call takes.
    """
    (site,) = edit.sites
    operators = [n for n in (*edit.new, *edit.candidates) if n is not None]
    kept = {name: place for new in operators for name, place in new.inputs.items()}
    teacher = [CutInput("x", site.path, site.stream)]
    teacher += [CutInput(name, site.path, place) for name, place in kept.items()]
    if edit.new:
        own = edit.new[0].inputs
        student = [CutInput("x", site.path, 0), *(CutInput(n, site.path, n) for n in own)]
    else:
        taken = {given.argument: given.name for given in teacher}
        for given in _region_inputs((site,), edit.graph, program):
            if given.argument not in taken:
                teacher.append(given)
        student = teacher
    return (
        Cut(edit.graph, tuple(teacher), site.path),
        Cut(edit.graph, tuple(student), site.path),
    )


def _region_inputs(
    sites: tuple[analysis.Site, ...], path: str, program: Program
) -> tuple[CutInput, ...]:
    """What a region of calls reads from outside: the stream first, then the blocks' own inputs."""
    graph = program.root.get_submodule(path)
    assert isinstance(graph, fx.GraphModule)
    nodes = {n.name: n for n in graph.graph.nodes}
    inside = {nodes[s.node] for s in sites}
    found: dict[fx.Node, CutInput] = {}
    for site in sites:
        order = sorted(range(len(nodes[site.node].args)), key=lambda i: i != site.stream)
        for i in order:
            given = nodes[site.node].args[i]
            if isinstance(given, fx.Node) and given not in inside and given not in found:
                found[given] = CutInput("x" if not found else given.name, site.path, i)
    return tuple(found.values())


def _loss(distill: language.Distill | None) -> Loss:
    if distill is None:
        return Loss()
    return Loss(distill.loss, distill.weight, distill.delta, mask_above=distill.mask_above)


def _budget(distill: language.Distill | None) -> Budget:
    if distill is None:
        return Budget()
    return Budget(
        distill.samples,
        distill.epochs,
        distill.steps,
        distill.batch,
        distill.lr,
        distill.data_fraction,
        distill.clip,
        distill.patience,
    )


def _stage2(finetune: language.Finetune | None, plan: Plan) -> Stage2:
    """`train inserted` of any rule holds in stage 2, unless `finetune` says what to train."""
    inserted = [n.path for e in plan.edits if e.rule.train_inserted for n in e.new]
    only = Only(tuple(inserted)) if inserted else None
    if finetune is None:
        return Stage2() if only is None else Stage2(train=only)
    given = {
        "data": finetune.data_fraction,
        "samples": finetune.samples,
        "steps": finetune.steps,
        "epochs": finetune.epochs,
        "batch": finetune.batch,
        "lr": finetune.lr,
        "warmup": finetune.warmup,
        "ema": finetune.ema,
        "clip": finetune.clip,
        "halve_lr_at": finetune.halve_lr_at or None,
        "train": _train(finetune.train) or only,
        "task": finetune.task,
        "teacher": finetune.teacher,
        "features": finetune.features,
        "precision": finetune.precision,
        "checkpointing": finetune.checkpointing,
        "preview": finetune.preview,
    }
    return Stage2(**{k: v for k, v in given.items() if v is not None})  # pyright: ignore[reportArgumentType]


def _train(train: object) -> object:
    return Lora(train.rank, train.alpha) if isinstance(train, language.Lora) else train
