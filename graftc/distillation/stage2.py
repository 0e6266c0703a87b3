"""Stage 2: end-to-end finetuning on the task's own loss, of a student or of the teacher.

One engine serves both, because a teacher short of convergence gains from any further step: what a
graft costs is told only against the teacher given the same stage 2.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from graftc.diagnostics import GraftError, fail
from graftc.distillation import lora
from graftc.distillation.budget import stage2_plan
from graftc.distillation.data import Task, open_data
from graftc.distillation.optim import named
from graftc.distillation.out_of_memory import memory_told
from graftc.distillation.pieces import held, in_pieces
from graftc.distillation.planner2 import Stage2Plan
from graftc.distillation.preview import Preview
from graftc.distillation.ranks import ALONE, Ranks
from graftc.distillation.recompute import recomputed
from graftc.distillation.run import Progress, Run
from graftc.distillation.saving import Saver, silent
from graftc.distillation.scopes import keeping_freed_memory, random_of
from graftc.distillation.stage2_run import Finetuned, Stage2Run, sheets
from graftc.distillation.students import is_under
from graftc.distillation.targets import Lora, ModelInput, Site, Stage2
from graftc.distillation.terms import Terms

ADAPTER = "adapter"
"""The folder of a run that keeps LoRA's adapters, as peft writes them."""


def finetune_module(
    module: nn.Module,
    task: Task,
    data: Any,
    *,
    stage2: Stage2 | None = None,
    inserted: Sequence[str] = (),
    inputs: Sequence[ModelInput] = (),
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    validation: Any = None,
    device: str = "cpu",
    run: Run | None = None,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
    teacher: nn.Module | None = None,
    sites: Sequence[Site] = (),
    preview: Preview | None = None,
    ranks: Ranks = ALONE,
    pieces: bool = False,
    announce: Callable[[Stage2Plan], None] | None = None,
) -> Finetuned:
    """Train `module` in place on `task.loss`; it ends with the EMA weights, in its own mode.

    `stage2` gives the terms (`train` "inserted": only parameters under the prefixes `inserted`; a
    parameter that takes no gradient, such as a fixed position table, is never trained);
    `steps`, `batch` and `lr` override it. The rate rises over `warmup` steps (at most a tenth of
    all), stays, and halves at each of `halve_lr_at`. The average's decay is min(ema, (1+s)/(10+s))
    at step s, so that a short run does not average in its first weights. Steps without a finite
    gradient are skipped and counted; 20 in a row are an error (G545). With `run`, checkpoints go
    there, and one that is there is resumed; adapters are kept there, and sheets of samples where
    `preview` (or `stage2.preview`) asks for them. Of `stage2`'s terms, `teacher` and `features` need the
    teacher, and the second the sites. What is measured and returned is the task's loss alone.

    `announce` gets the plan with its predictions before anything is trained (`plan_module` stops there).
    `ranks` share each batch, with the whole model in each (DDP), or in `pieces` (FSDP2); of a model that was in pieces
    rank 0 alone has the weights at the end.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> class Half:
    ...     def prepare(self, sample, generator):
    ...         return Ready({"input": sample["x"]})
    ...     def loss(self, outputs, prepared):
    ...         return (outputs - prepared.inputs["input"] / 2).square().mean()
    >>> @dataclass
    ... class Ready:
    ...     inputs: dict
    ...     def to(self, device):
    ...         return self
    >>> data = [{"x": torch.full((1,), i / 10)} for i in range(20)]
    >>> done = finetune_module(nn.Linear(1, 1), Half(), data, steps=60, lr=0.05)
    >>> done.loss_end < done.loss_start
    True
    """
    with _opened(
        module, task, data, stage2=stage2, inserted=inserted, inputs=inputs, seed=seed, steps=steps, batch=batch, lr=lr,
        validation=validation, device=device, run=run, teacher=teacher, sites=sites, preview=preview, ranks=ranks, pieces=pieces,
    ) as opened:  # fmt: skip
        engine, own = opened.engine, opened.engine.own
        again = (
            recomputed(own.module, engine.loss.graphs)
            if engine.terms.checkpointing
            else nullcontext()
        )
        with again, memory_told("stage 2", engine.smaller), keeping_freed_memory():
            if announce is not None and not engine.resumes:
                _announce(engine, announce)
            result = engine.run_all(
                Saver(checkpoint_every),
                progress or silent,
                sheets(engine, opened.preview, opened.teacher),
            )
    if own.give_back(module) and isinstance(engine.terms.train, Lora):
        if run is not None and ranks.first:
            lora.save(module, run.path / ADAPTER)
        was_training = module.training
        lora.merge(module)
        module.requires_grad_(True)
        module.train(was_training)
    return result


def plan_module(module: nn.Module, task: Task, data: Any, **given: Any) -> Stage2Plan:
    """What `finetune_module` with these arguments would take; one step is run, to time it, and `module` is as it was.

    But for adapters, which stay in it. Raises GraftError (G841) where sizes cannot be computed.
    """
    with (
        _opened(module, task, data, **given) as opened,
        memory_told("stage 2", opened.engine.smaller),
    ):
        return opened.engine.planned()


def _announce(engine: Stage2Run, announce: Callable[[Stage2Plan], None]) -> None:
    """Tell the plan; where sizes cannot be computed, nothing depends on them: record that."""
    try:
        announce(engine.planned())
    except GraftError as error:
        if error.diagnostics[0].code != "G841":
            raise
        if engine.run is not None:
            engine.run.record(plan=f"none: {error.diagnostics[0].message}")


@dataclass(frozen=True)
class _Opened:
    """A run of stage 2 that is ready to begin."""

    engine: Stage2Run
    preview: Preview | None
    teacher: nn.Module | None


@contextmanager
def _opened(
    module: nn.Module,
    task: Task,
    data: Any,
    *,
    stage2: Stage2 | None = None,
    inserted: Sequence[str] = (),
    inputs: Sequence[ModelInput] = (),
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    validation: Any = None,
    device: str = "cpu",
    run: Run | None = None,
    teacher: nn.Module | None = None,
    sites: Sequence[Site] = (),
    preview: Preview | None = None,
    ranks: Ranks = ALONE,
    pieces: bool = False,
) -> Generator[_Opened]:
    """Choose what trains, put it where it runs, and give the module back as it was."""
    terms = stage2 or Stage2()
    source = open_data(
        data, seed=seed, fraction=terms.data, samples=terms.samples, validation=validation
    )
    plan = stage2_plan(terms, source.size, steps=steps, batch=batch, lr=lr)
    ranks.enough(plan.batch)
    was_training = module.training
    if isinstance(terms.train, Lora):
        with random_of(seed, "lora", device=device):
            names = lora.inject(module, terms.train)
    else:
        names = [
            n
            for n, parameter in named(module.named_parameters())
            if parameter.requires_grad and (terms.train == "all" or is_under(n, inserted))
        ]
    if not names:
        fail("G542", "stage 2 has no parameter to train", site="stage2.train",
             wanted=", ".join(inserted) or "inserted modules", found="none of them in the model")  # fmt: skip
    if preview is None and terms.preview is not None:
        preview = Preview(terms.preview)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    chosen, features = set(names), terms.features > 0
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    if not pieces:
        module = module.to(device)
    elif teacher is not None:
        cuts = [s.teacher for s in sites] if features else []
        teacher = in_pieces(teacher, ranks, cuts, frozen=True).module
    own = held(module, ranks, pieces=pieces, cuts=[s.student for s in sites] if features else [])
    try:
        loss = Terms(own, task, terms, teacher=teacher, sites=sites, device=device)
        engine = Stage2Run(own, loss, source, terms, plan, names, inputs, seed, device, run)
        engine.beside = teacher
        yield _Opened(engine, preview, teacher)
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(before[name])
        module.train(was_training)


def terms_of(stage2: Stage2, changes: Mapping[str, Any]) -> Stage2:
    """`stage2` with what the caller overrides; None leaves a term as it is.

    >>> terms_of(Stage2(), {"ema": 0.9, "clip": None}).ema
    0.9
    """
    return replace(stage2, **{k: v for k, v in changes.items() if v is not None})


Which = Literal["student", "teacher"]
