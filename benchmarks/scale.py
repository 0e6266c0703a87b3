"""What two real grafts would take on one GPU, on eight and on sixteen: arithmetic from the cost model, nothing is run.

    python benchmarks/scale.py            # the tables
    python benchmarks/scale.py --write    # into docs/scale.md, between its marks

The models are captured on the meta device. FLOPs, parameters and the bytes of the sites' values come from the plan and its
targets, steps and batches from the files as `distill` and `finetune` read them; the machine's figures are the maker's.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from timing import Report
from torch import nn

from graftc.distillation.budget import samples_of, site_plans, stage2_plan
from graftc.distillation.targets import Lora, Stage2, Targets
from graftc.language.check import check
from graftc.loading import as_model
from graftc.program.analysis import analyse
from graftc.program.capture import capture
from graftc.rewrite.plan import make_plan
from graftc.targets import make_targets
from graftc.units import size_text

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- benchmarks/scale.py -->", "<!-- end -->"
CASES = (
    ("DiT-XL/2, 256 px", "examples/dit_xl2/hyena_x_50.graft", "examples/dit_xl2/model.py:teacher", 1_281_167),
    ("PixArt-Sigma, 2048 px", "tests/corpus/pixart_2k.graft", "examples/diffusers/models.py:pixart_sigma_2k", 12_000),
)  # fmt: skip
"""Name, file, MODEL, and samples in DATA: ImageNet's, and those that the file asks for."""

FP32, BF16 = 67e12, 989e12
MEMORY = 80e9
NVLINK, ETHERNET = 450e9, 50e9
USED = 0.4


@dataclass(frozen=True)
class Machine:
    """Nodes of eight H100s; `wire` is what a GPU sends a second, in a ring over all of them."""

    gpus: int

    @property
    def wire(self) -> float:
        return NVLINK if self.gpus <= 8 else ETHERNET

    def ring(self, size: float, passes: int) -> float:
        """Bytes that a GPU sends where `size` bytes go round: an all-reduce is two passes, a gather one."""
        return passes * (self.gpus - 1) / self.gpus * size


@dataclass(frozen=True)
class Case:
    """What the cost model says of a graft."""

    name: str
    targets: Targets
    samples: int
    teacher: int
    student: int
    parameters: int
    trained: int
    adapters: int

    @property
    def stage2(self) -> Stage2:
        return self.targets.stage2


def case(name: str, file: str, model: str, samples: int) -> Case:
    loaded = as_model(f"{ROOT / model}", on_meta=True)
    analysis = analyse(capture(loaded))
    plan = make_plan(check(ROOT / file, {}), analysis)
    targets = make_targets(plan, analysis.program)
    rank = targets.stage2.train.rank if isinstance(targets.stage2.train, Lora) else 0
    linear = [m for m in loaded.module.modules() if isinstance(m, nn.Linear)]
    new = sum(step.after.params for step in plan.steps)
    return Case(name, targets, samples, plan.flops[0], plan.flops[1], plan.parameters[1], new,
                sum(rank * (m.in_features + m.out_features) for m in linear))  # fmt: skip


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def stage1(one: Case) -> list[tuple[str, ...]]:
    """Each way on each machine. The teacher and the sites run in the weights' float32."""
    sites = one.targets.sites
    (share, count) = samples_of(sites)
    known = min(one.samples, count or one.samples) if share is None else int(share * one.samples)
    plan = next(iter(site_plans(sites, known).values()))
    students = sum(s.sample.student_flops for s in sites if s.sample)
    values = sum(s.sample.bytes for s in sites if s.sample)
    weights = 4 * one.parameters
    ways = [
        ("one process", 1),
        ("data", 8),
        ("data", 16),
        ("data, --shard-teacher", 8),
        ("data, --shard-teacher", 16),
        ("sites", 8),
    ]
    rows: list[tuple[str, ...]] = []
    for way, gpus in ways:
        machine = Machine(gpus)
        apart = (
            gpus if way == "sites" else 1
        )  # each process has whole batches, for its share of the sites
        mine = plan.batch * apart / gpus
        flops = mine * (one.teacher + 3 * students / apart)
        pieces = gpus if "shard" in way else 1
        sent = 0.0 if way in ("sites", "one process") else machine.ring(4 * one.trained, 2)
        sent += machine.ring(weights, 1) if pieces > 1 else 0.0
        seconds = flops / (FP32 * USED) + sent / machine.wire
        memory = weights / pieces + weights + 4 * 4 * one.trained / apart + mine * values / apart
        rows.append((one.name, way, str(gpus), f"{plan.steps:,} of {plan.batch}", hours(plan.steps * seconds), f"{1e3 * seconds:,.0f} ms",
                     size_text(memory) + (" (too much)" if memory > MEMORY else ""), size_text(sent) if sent else "0"))  # fmt: skip
    return rows


def stage2(one: Case) -> list[tuple[str, ...]]:
    """The file's stage 2, in bfloat16, with the blocks' inner values computed again."""
    terms = one.stage2
    share = int(terms.data * one.samples) if terms.data else terms.samples or one.samples
    plan = stage2_plan(terms, share)
    trained = one.adapters or one.parameters
    # A forward pass, the same again in the backward pass, and gradients: of inputs, and of weights where they train.
    passes = 3 if one.adapters else 4
    rows: list[tuple[str, ...]] = []
    for way, gpus in (("one process", 1), ("data", 8), ("data", 16), ("pieces", 8), ("pieces", 16)):
        machine = Machine(gpus)
        flops = plan.batch / gpus * passes * one.student
        pieces = gpus if way == "pieces" else 1
        held = 4 * (one.parameters + 4 * trained)  # weights; gradients, two moments, average
        memory = held / pieces + (4 * trained if way == "data" else 0)  # DDP's buckets
        reduced = machine.ring(4 * trained, 1 if way == "pieces" else 2)
        gathered = machine.ring(4 * one.parameters, 3) if way == "pieces" else 0.0
        sent = 0.0 if gpus == 1 else reduced + gathered
        work = flops / (BF16 * USED)
        wire = sent / machine.wire
        seconds = max(work, wire) if way == "data" else work + wire
        rows.append((one.name, way, str(gpus), f"{plan.steps:,} of {plan.batch}", hours(plan.steps * seconds), f"{1e3 * seconds:,.0f} ms",
                     size_text(memory) + (" (too much)" if memory > MEMORY else ""), size_text(sent) if sent else "0"))  # fmt: skip
    return rows


COLUMNS = (
    "graft",
    "way",
    "GPUs",
    "steps",
    "time",
    "a step",
    "memory a GPU",
    "sent by a GPU a step",
)


def measure() -> tuple[Report, Report, Report]:
    found = [case(*given) for given in CASES]
    facts = [
        (c.name, str(len(c.targets.sites)), f"{c.teacher / 1e9:,.0f} G", f"{c.student / 1e9:,.0f} G", f"{c.parameters / 1e6:,.0f} M",
         f"{c.trained / 1e6:,.0f} M", size_text(sum(s.sample.bytes for s in c.targets.sites if s.sample)))
        for c in found
    ]  # fmt: skip
    columns = (
        "graft",
        "sites",
        "teacher, FLOPs a sample",
        "student",
        "parameters",
        "of the new operators",
        "values of all sites a sample",
    )
    return (
        Report("What the cost model says", columns, tuple(facts), ()),
        Report("Stage 1, computed", COLUMNS, tuple(r for c in found for r in stage1(c)), ()),
        Report("Stage 2, computed", COLUMNS, tuple(r for c in found for r in stage2(c)), ()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    text = "\n".join(report.markdown() for report in measure()).replace("## ", "### ")
    if not parser.parse_args().write:
        print(text)
        return
    head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
