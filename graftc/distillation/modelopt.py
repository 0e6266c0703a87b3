"""Targets as a layer-wise distillation config of NVIDIA Model-Optimizer (`modelopt.torch.distill`).

Its mode `layerwise_kd` hooks pairs of modules: a student's module is called with the positional arguments of the
teacher's, and a loss compares what the two return. A site fits where it is one call of one module in both models.
Source: github.com/NVIDIA/Model-Optimizer, modelopt/torch/distill (version 0.47).
"""

from __future__ import annotations

import pprint
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftc.diagnostics import Diagnostic, GraftError, Note, fail
from graftc.distillation.cuts import passed_by_position
from graftc.distillation.modelopt_text import TEXT
from graftc.distillation.plain import Distillation
from graftc.distillation.targets import Site

MODE = "layerwise_kd"


@dataclass(frozen=True)
class ModelOptConfig:
    """What Model-Optimizer can be told of a build.

    `pairs`: (module of the student, module of the teacher) → settings of its loss. `trainable`: prefixes of the
    student's parameters. `left_out`: site → why it is no pair. `differs`: what it does otherwise than graftc.
    """

    pairs: dict[tuple[str, str], dict[str, Any]]
    trainable: tuple[str, ...]
    left_out: dict[str, str]
    differs: tuple[str, ...]

    def to_python(self, build: Path) -> str:
        """The config as a Python file with a training loop; it runs where torch, graftc and modelopt are."""
        told = [f"{name}: not here, {why}" for name, why in self.left_out.items()]
        lines = "\n".join(f"  - {line}" for line in (*told, *self.differs))
        return TEXT.format(
            build=str(build.absolute()),
            mode=MODE,
            differs=f"What is otherwise than in `graftc distill`:\n{lines}\n",
            sites="\n".join(f"    {pair!r}: {said!r}," for pair, said in self.pairs.items()),
            trainable=pprint.pformat(self.trainable, width=96),
        )


def modelopt_config(work: Distillation) -> ModelOptConfig:
    """Which sites fit, and how. Raises GraftError where none does (G583)."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    chosen: list[Site] = []
    for site in work.targets.sites:
        why = _misfit(site, work.teacher, work.student)
        if why is None and (site.student.output, site.teacher.output) in pairs:
            why = "another site is the same pair of modules"
        if why is not None:
            left_out[site.name] = why
            continue
        chosen.append(site)
        loss = site.loss
        pairs[site.student.output, site.teacher.output] = {
            "kind": loss.kind,
            "weight": loss.weight,
            "delta": loss.delta,
            "normalise": loss.normalise,
            "mask_above": loss.mask_above,
        }
    if not pairs:
        notes = tuple(Note(f"{name}: {why}") for name, why in left_out.items())
        raise GraftError(
            Diagnostic("G583", f"no site of this build fits Model-Optimizer's `{MODE}`", site="targets.yaml",
                       wanted="a site that is one call of one module in teacher and student", notes=notes,
                       help="`graftc distill` trains it, or `graftc.load_targets` in a loop of your own")
        )  # fmt: skip
    trainable = tuple(dict.fromkeys(prefix for site in chosen for prefix in site.trainable))
    return ModelOptConfig(pairs, trainable, left_out, tuple(_differences(chosen, work)))


def write_modelopt(work: Distillation, build: Path, output: Path) -> ModelOptConfig:
    """Write the file, whole or not at all. Raises GraftError (G550, G583)."""
    made = modelopt_config(work)
    partial = output.with_name(f".{output.name}.writing")
    try:
        partial.write_text(made.to_python(build), encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        fail("G550", f"cannot write `{output.name}`: {error}", site=str(output))
    return made


def _misfit(site: Site, teacher: nn.Module, student: nn.Module) -> str | None:
    """Why a site is no pair of modules; None where it is one."""
    if site.exact:
        return "it is exact and not trained"
    theirs, ours = (
        passed_by_position(teacher, site.teacher),
        passed_by_position(student, site.student),
    )
    if theirs is None or ours is None:
        return "it is more than one call"
    if theirs != ours:
        shown = " and ".join(f"({', '.join(n or '_' for n in names)})" for names in (theirs, ours))
        return f"teacher and student are called with other positional arguments: {shown}"
    return None


def _differences(sites: Sequence[Site], work: Distillation) -> list[str]:
    """What the mode cannot do of what the targets ask for, a line each."""
    said = [
        "units of a loss and the kind of `auto` are told from a batch, not from the held-out samples",
        "there is no schedule, no held-out error, no best weights and no resume but those of your own loop",
        "both models run whole in each step; graftc cuts the teacher off and runs the sites alone",
    ]

    def named(those: Sequence[Site]) -> str:
        return ", ".join(site.name for site in those)

    if gated := [s for s in sites if s.teacher.gate]:
        said.append(f"the loss is not weighted by the gate that follows: {named(gated)}")
    if keyword := [s for s in sites if _by_keyword(s, work.student)]:
        said.append(f"inputs by keyword are the student's own: {named(keyword)}")
    if mixed := [s for s in sites if any(s.student_inputs)]:
        said.append(f"no mix with the student's own inputs: {named(mixed)}")
    if ordered := [s for s in sites if s.after]:
        said.append(f"trained together with the sites inside them, not after: {named(ordered)}")
    if choice := [s for s in sites if s.candidates]:
        said.append(f"the student's own candidate alone is trained: {named(choice)}")
    return said


def _by_keyword(site: Site, student: nn.Module) -> bool:
    by_position = passed_by_position(student, site.student) or ()
    return any(given.name not in by_position for given in site.student.inputs)
