"""What a run of stage 1 or stage 2 is predicted to take, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftc.cli.render import wide_console, wide_table

if TYPE_CHECKING:
    from graftc.distillation.planner import Choice, Machine, TrainingPlan
    from graftc.distillation.planner2 import Stage2Plan


def show_training_plan(plan: TrainingPlan, *, to_stderr: bool = False) -> None:
    """What a run of stage 1 is predicted to take, and what the other ways would."""
    from graftc.diagnostics import render
    from graftc.distillation.planner import others
    from graftc.units import size_text

    print_ = wide_console(to_stderr=to_stderr).print
    for costs, made in plan.groups:
        names = ", ".join(costs.sites[:4]) + (", …" if len(costs.sites) > 4 else "")
        number = f"{len(costs.sites)} site{'s' * (len(costs.sites) != 1)}"
        if not costs.steps:
            print_(f"{number} ({names}): first weights alone; no `distill` trains them")
            continue
        print_(f"{number} together ({names}), {costs.steps} steps of {costs.batch} samples")
        table = wide_table("", "teacher passes", "time", "peak memory", "disk")
        ways = [
            w for w in others(costs, plan.machine) if (w.mode, w.reuse) != (made.mode, made.reuse)
        ]
        for way in (made, *ways):
            table.add_row(
                ("> " if way is made else "  ") + _way(way),
                str(way.passes),
                "not measured" if way.seconds is None else _duration(way.seconds),
                size_text(way.peak),
                size_text(way.disk) if way.disk else "none",
            )
        print_(table)
    took = "not measured" if plan.seconds is None else _duration(plan.seconds)
    if plan.ranks:
        print_(plan.ranks)
    for told in plan.warnings:
        print_(render(told))
    disk = f", disk {size_text(plan.disk)}" if plan.disk else ", no disk"
    print_(f"predicted: {took}, peak {size_text(plan.peak)}{disk}; {_free(plan.machine)}")


def _way(way: Choice) -> str:
    if way.mode == "stream":
        return "stream"
    where = " and ".join(place for place in way.places)
    kept = f"{way.window.batches} batches on {where}" if where else f"{way.window.batches} batches"
    return f"{way.mode}, reuse {way.reuse}, {kept}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_stage2_plan(plan: Stage2Plan, *, to_stderr: bool = False) -> None:
    """What a run of stage 2 is predicted to take, and by what."""
    from graftc.units import size_text

    print_ = wide_console(to_stderr=to_stderr).print
    costs = plan.costs
    each = " in each process" if costs.ranks > 1 else ""
    print_(f"stage 2, {costs.steps} steps of {costs.batch} samples{each}")
    table = wide_table("", "memory")
    for name, size in plan.parts.items():
        table.add_row(name, size_text(size))
    print_(table)
    if costs.checkpointed is not None and costs.peak(costs.checkpointed) < plan.peak:
        print_(f"with --checkpointing: peak {size_text(costs.peak(costs.checkpointed))}")
    took = "not measured" if plan.seconds is None else _duration(plan.seconds)
    print_(
        f"predicted: {took}, peak {size_text(plan.peak)}, disk {size_text(costs.disk)}; {_free(plan.machine)}"
    )


def _free(machine: Machine) -> str:
    from graftc.units import size_text

    free = f"{size_text(machine.memory)} of memory and {size_text(machine.disk)} of disk are free"
    if machine.device:
        free = f"{size_text(machine.device)} of device memory, {free}"
    return free
