"""Stage 2's loss: the task's own, the teacher's output, and the outputs of the sites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftc.diagnostics import GraftError, fail
from graftc.distillation.cuts import capture_graph
from graftc.distillation.data import Task
from graftc.distillation.loss import wide
from graftc.distillation.out_of_memory import is_out_of_memory
from graftc.distillation.pieces import Whole
from graftc.distillation.ranks import ALONE, LostError, Ranks
from graftc.distillation.sources import describe
from graftc.distillation.targets import Site, Stage2
from graftc.program.model import user_error
from graftc.tasks.base import primary

_TINY = 1e-12


def relative_error(output: Tensor, target: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """‖output − target‖² / ‖target‖² over a batch, in float32; with several processes, what this one adds to it.

    >>> relative_error(torch.zeros(3), torch.ones(3))
    tensor(1.)
    """
    exact = wide(target)
    energy = exact.square().sum()
    ranks.add([energy])
    return (wide(output) - exact).square().sum() / energy.clamp(min=_TINY)


class Terms:
    """The loss of a batch, as the sum of its terms, each times its weight.

    The teacher's output is compared by the task's `imitate(outputs, of_teacher, prepared)` where it has
    one (KL divergence, of logits), and else by the relative squared error of the output. The features
    term is the mean over the sites of the relative squared error between the student's output at its
    cut and the teacher's, each model on its own inputs.

    Of several processes (`ranks`, in `held`), each with its rows of a batch, each gives its part of the whole
    batch's terms: their sum is what one process would give. The task's means are over the samples, or over as
    many numbers as its `weight(prepared)` says (tokens that count).
    """

    def __init__(
        self,
        held: Whole,
        task: Task,
        stage2: Stage2,
        *,
        teacher: nn.Module | None = None,
        sites: Sequence[Site] = (),
        device: str = "cpu",
    ) -> None:
        self.module, self.task, self.stage2 = held.module, task, stage2
        self.ranks = held.ranks
        self._device = torch.device(device).type
        wanted = [n for n in ("teacher", "features") if getattr(stage2, n) > 0]
        if wanted and teacher is None:
            fail("G553", f"the term `{wanted[0]}` of stage 2 needs the teacher", site=f"stage2.{wanted[0]}",
                 help="give `teacher=`, or set the term's weight to 0")  # fmt: skip
        if stage2.features > 0 and not sites:
            fail("G553", "the term `features` of stage 2 needs sites, and there are none",
                 site="stage2.features", help="set its weight to 0")  # fmt: skip
        if not (stage2.task > 0 or wanted):
            fail("G553", "stage 2 has no term: every weight is 0", site="stage2.task",
                 wanted="task, teacher or features above 0")  # fmt: skip
        self.teacher = teacher.eval().to(device) if teacher is not None and wanted else None
        self.graphs: list[nn.Module] = []
        if stage2.features > 0 and self.teacher is not None:
            self.teacher = capture_graph(self.teacher, [s.teacher for s in sites], result=True)
            cuts = [s.student for s in sites]
            self.graphs = [capture_graph(held.module, cuts, result=True)]
        self._running = held.running(self.graphs[0] if self.graphs else held.module)

    def __call__(self, prepared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its terms without their weights."""
        weights, ranks = self.stage2, self.ranks
        share = self._share(prepared)
        with self.cast():
            outputs, features = self._run(self._running, prepared)
            parts: dict[str, Tensor] = {}
            if weights.task > 0:
                parts["task"] = self._part(self.task_loss, share, outputs, prepared)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted, wanted_features = self._run(self.teacher, prepared)
                if weights.teacher > 0:
                    parts["teacher"] = self._imitation(share, outputs, wanted, prepared)
                if weights.features > 0:
                    pairs = zip(features, wanted_features, strict=True)
                    errors = [relative_error(a[-1], b[-1], ranks) for a, b in pairs]
                    parts["features"] = torch.stack(errors).mean()
            total = [getattr(weights, name) * part for name, part in parts.items()]
            return torch.stack([wide(t).reshape(()) for t in total]).sum(), parts

    def alone(self) -> Terms:
        """The same loss without the other processes: what a step of this one takes is told without asking them."""
        if self.ranks.size == 1:
            return self
        made = copy.copy(self)
        made.ranks = ALONE
        made._running = self.graphs[0] if self.graphs else self.module
        return made

    def cast(self) -> Any:
        """The precision of the forward passes: bfloat16 by autocast, weights and optimiser in float32."""
        if self.stage2.precision == "bfloat16":
            return torch.autocast(self._device, dtype=torch.bfloat16)
        return nullcontext()

    def task_loss(self, outputs: Any, prepared: Any) -> Tensor:
        """The task's loss; what the user's code raises, or returns in its place, is told (G203)."""
        return self._scalar("loss", self.task.loss, outputs, prepared)

    def weight(self, prepared: Any) -> float:
        """How many numbers the task's means are over, on this batch: what the task says, or the samples."""
        own = getattr(self.task, "weight", None)
        if own is None:
            return float(len(next(iter(prepared.inputs.values()))))
        with told("TASK.weight"):
            return float(own(prepared))

    def _share(self, prepared: Any) -> float:
        """How much of the whole batch's mean is over the rows of this process."""
        if self.ranks.size == 1:
            return 1.0
        own = self.weight(prepared)
        total = self.ranks.total([[own]])[0][0]
        return own / total if total else 0.0

    def _part(self, function: Callable[..., Tensor], share: float, *given: Any) -> Tensor:
        if self.ranks.size == 1:
            return function(*given)
        if not share:  # a mean over nothing is no number
            return primary(given[0]).sum() * 0.0
        return function(*given) * share

    def _run(self, module: Callable[..., Any], prepared: Any) -> tuple[Any, Any]:
        found = module(**prepared.inputs)
        return (found[1], found[0]) if self.stage2.features > 0 else (found, ())

    def _imitation(self, share: float, outputs: Any, wanted: Any, prepared: Any) -> Tensor:
        own = getattr(self.task, "imitate", None)
        if own is not None:
            imitate = partial(self._scalar, "imitate", own)
            return self._part(imitate, share, outputs, wanted, prepared)
        with told("the model's output"):
            return relative_error(primary(outputs), primary(wanted), self.ranks)

    def _scalar(self, name: str, function: Any, *given: Any) -> Tensor:
        with told(f"TASK.{name}"):
            value = function(*given)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"`{name}` returned {describe(value)}, not a tensor of one number")
        return value


@contextmanager
def told(site: str) -> Generator[None]:
    """Tell what the user's Task raises as a diagnostic; a GraftError stays as it is."""
    try:
        yield
    except (GraftError, LostError):
        raise
    except Exception as error:
        if is_out_of_memory(error):  # no fault of the user's code
            raise
        raise user_error(error, "TASK", site) from error
