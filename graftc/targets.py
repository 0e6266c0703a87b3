"""From a plan to distillation targets: each learned edit becomes a pair of cuts.

The teacher's cut is the region that the edit rewires, the student's what stands in its place;
an edit inside another's region is distilled first.
"""

from __future__ import annotations

from torch import fx

from graftc.distillation.targets import (
    Budget,
    Cut,
    CutInput,
    Lora,
    Loss,
    ModelInput,
    Pending,
    Site,
    Stage2,
    Targets,
)
from graftc.language import rules as language
from graftc.program.program import Program
from graftc.rewrite.edits import Edit, NewModule
from graftc.rewrite.plan import Plan, Step, after_text
from graftc.weights.assign import present


def make_targets(plan: Plan, program: Program) -> Targets:
    """The targets of a plan on the original Program.

    An edit that is not learned has none, unless weights of it wait for data: then it is solved,
    and not trained.
    """
    learned = [
        s
        for s in plan.steps
        if s.edit.new and (_is_learned(s) or any(o.pending for o in s.origins))
    ]
    return Targets(
        inputs=tuple(ModelInput(p.name, p.shape, p.dtype, p.meaning) for p in program.inputs),
        sites=tuple(_site(s, learned, program) for s in learned),
        stage2=_stage2(plan.finetune),
    )


def _site(step: Step, learned: list[Step], program: Program) -> Site:
    edit = step.edit
    teacher, student = _cuts(edit, program)
    rule = edit.rule
    new = [n.path for n in edit.new]
    branches = [s.path for s in edit.sites] if edit.kind == "parallel" else []
    trainable = new if rule.train_inserted else list(dict.fromkeys([*branches, *new]))
    group = rule.distill.train if rule.distill is not None else None
    if group is not None and group in edit.new[0].spec.groups:
        trainable = _of_group(edit.new[0], group)
    return Site(
        name=edit.name,
        teacher=teacher,
        student=student,
        trainable=tuple(p for p in trainable if p),
        rule=rule.name,
        origin=edit.origin,
        operator=edit.new[-1].spec.name if edit.kind == "parallel" else after_text(edit),
        pending=tuple(
            dict.fromkeys(
                Pending(
                    o.parameter.removesuffix(f".{o.module}.{o.parameter.rpartition('.')[2]}"),
                    o.module,
                )
                for o in step.origins
                if o.pending
            )
        ),
        loss=_loss(rule.distill),
        budget=_budget(rule.distill) if _is_learned(step) else Budget(steps=0),
        after=tuple(
            other.edit.name
            for other in learned
            if other is not step
            and any(
                inner.path.startswith(outer.path + ".")
                for inner in other.edit.sites
                for outer in edit.sites
            )
        ),
    )


def _of_group(new: NewModule, group: str) -> list[str]:
    """The parameters of a group that the operator's spec names (`distill …, train = feature_maps`)."""
    slots = [s for s in present(new.spec, new.arguments) if s.name in new.spec.groups[group]]
    paths = [".".join(p for p in (new.path, s.module, s.parameter) if p) for s in slots]
    return list(dict.fromkeys(paths))


def _is_learned(step: Step) -> bool:
    return step.edit.rule.contract == "learned"


def _cuts(edit: Edit, program: Program) -> tuple[Cut, Cut]:
    first = edit.sites[0]
    if edit.kind == "replace":
        kept = edit.new[0].inputs.items()
        return (
            Cut(
                edit.graph,
                (
                    CutInput("x", first.path, first.stream),
                    *(CutInput(name, first.path, place) for name, place in kept),
                ),
                first.path,
            ),
            Cut(
                edit.graph,
                (
                    CutInput("x", first.path, 0),
                    *(CutInput(name, first.path, name) for name, _ in kept),
                ),
                edit.new[0].path,
            ),
        )
    inputs = _region_inputs(edit, program)
    return (
        Cut(edit.graph, inputs, edit.sites[-1].path),
        Cut(edit.graph, inputs, edit.new[-1].path),
    )


def _region_inputs(edit: Edit, program: Program) -> tuple[CutInput, ...]:
    """What the region of a `parallel` reads from outside: the stream first, then the blocks' own inputs."""
    graph = program.root.get_submodule(edit.graph)
    assert isinstance(graph, fx.GraphModule)
    nodes = {n.name: n for n in graph.graph.nodes}
    inside = {nodes[s.node] for s in edit.sites}
    found: dict[fx.Node, CutInput] = {}
    for site in edit.sites:
        order = sorted(range(len(nodes[site.node].args)), key=lambda i: i != site.stream)
        for i in order:
            given = nodes[site.node].args[i]
            if isinstance(given, fx.Node) and given not in inside and given not in found:
                found[given] = CutInput("x" if not found else given.name, site.path, i)
    return tuple(found.values())


def _loss(distill: language.Distill | None) -> Loss:
    return Loss(distill.loss, distill.weight, distill.delta) if distill else Loss()


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
    )


def _stage2(finetune: language.Finetune | None) -> Stage2:
    if finetune is None:
        return Stage2()
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
        "train": _train(finetune.train),
    }
    return Stage2(**{k: v for k, v in given.items() if v is not None})  # pyright: ignore[reportArgumentType]


def _train(train: object) -> object:
    return Lora(train.rank, train.alpha) if isinstance(train, language.Lora) else train
