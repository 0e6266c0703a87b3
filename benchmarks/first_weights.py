"""Where new weights should start: every init policy of every operator, on the digits teacher.

    python benchmarks/first_weights.py run      # measures what is not yet in first_weights.json
    python benchmarks/first_weights.py run --only 'linear_attention(feature = relu) | random, AdamW'
    python benchmarks/first_weights.py frechet  # four operators by Fréchet distance, likewise
    python benchmarks/first_weights.py table    # docs/first-weights.md from the JSON

The attentions of blocks 1, 3, 5 and 7 are replaced (`PLACES`: or their MLPs, first linears, norms). Both
commands stop and go on where they were; with one core they take about an hour and half an hour.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "examples" / "digits"), str(ROOT)]

from data import Digits  # noqa: E402
from first_weights_cases import CONSTANT, PLACES, Case, cases  # noqa: E402
from model import task, teacher  # noqa: E402

from graftc.compiler import site_parts  # noqa: E402
from graftc.distillation.loss import Scale, regression  # noqa: E402
from graftc.distillation.optim import Group, Optimiser, Schedule  # noqa: E402
from graftc.distillation.targets import Loss  # noqa: E402
from graftc.operators.build import arguments_at, build  # noqa: E402
from graftc.operators.spec import SITE  # noqa: E402
from graftc.operators.specs import SPECS  # noqa: E402
from graftc.program.analysis import Analysis, analyse  # noqa: E402
from graftc.program.capture import capture  # noqa: E402
from graftc.rewrite.inputs import own_facts  # noqa: E402
from graftc.weights.alternating import solve_alternating  # noqa: E402
from graftc.weights.choose import solve_keep_top  # noqa: E402
from graftc.weights.fit import Fit  # noqa: E402
from graftc.weights.initialise import initialise  # noqa: E402
from graftc.weights.parts import Heads  # noqa: E402
from graftc.weights.solve import solve_least_squares, solve_svd  # noqa: E402

RESULTS = HERE / "first_weights.json"
SITES = (1, 3, 5, 7)
POOL, CALIBRATION, HELD = 3000, 512, 128
BATCH = 64
BUDGETS = (100, 400)
TIMES = (25, 125, 250, 375, 500, 625, 750, 875)


class Mean(nn.Module):
    """What the teacher's site gives on average, token by token, whatever comes in."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", outputs.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("mean").expand_as(x)


@cache
def analysis() -> Analysis:
    return analyse(capture(teacher()))


@cache
def activations(kind: str) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the sites, stored once as the paper does: {"train" | "held": {block: (x, y)}}."""
    module = teacher().module
    generator = torch.Generator().manual_seed(20251121)
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for name, count in (("train", POOL), ("held", HELD)):
        digits = Digits("train" if name == "train" else "held_out")
        rows: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in SITES}
        handles = [_record(module.blocks[i].get_submodule(kind), rows[i]) for i in SITES]  # pyright: ignore
        index = torch.cat([torch.randperm(len(digits), generator=generator) for _ in range(2)])
        with torch.inference_mode():
            for piece in index[:count].split(250):
                module(**task().prepare(digits.batch(piece), generator).inputs)
        for handle in handles:
            handle.remove()
        found[name] = {
            i: (torch.cat([x for x, _ in r]).clone(), torch.cat([y for _, y in r]).clone())
            for i, r in rows.items()
        }
    return found


def _record(module: nn.Module, rows: list[tuple[Tensor, Tensor]]) -> Any:
    return module.register_forward_hook(lambda _, given, made: rows.append((given[0], made)))


@cache
def noised() -> tuple[dict[str, Tensor], Tensor]:
    """The held-out inputs at every timestep of TIMES, and the teacher's noise for them: paired for all rows."""
    digits = Digits("held_out").batch(torch.arange(HELD))
    generator = torch.Generator().manual_seed(7)
    clean = digits["latent"].repeat(len(TIMES), 1, 1, 1)
    t = torch.tensor(TIMES).repeat_interleave(HELD)
    noisy = task().diffuse(clean, torch.randn(clean.shape, generator=generator), t)
    inputs = {"x": noisy, "t": t, "y": digits["label"].repeat(len(TIMES))}
    return inputs, _noise(teacher().module, inputs)


def _noise(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        pieces = zip(*(x.split(256) for x in inputs.values()), strict=True)
        return torch.cat([module(*piece)[:, :1] for piece in pieces])


def output_error(model: nn.Module) -> dict[str, float]:
    """‖student − teacher‖² / ‖teacher‖² of the predicted noise, by timestep and over all."""
    inputs, wanted = noised()
    square = (_noise(model, inputs) - wanted).square().flatten(1).sum(1).view(len(TIMES), HELD)
    energy = wanted.square().flatten(1).sum(1).view(len(TIMES), HELD)
    by_time = (square.sum(1) / energy.sum(1)).tolist()
    return {"all": float(square.sum() / energy.sum())} | {
        str(t): e for t, e in zip(TIMES, by_time, strict=True)
    }


def grafted(kind: str, operators: Mapping[int, nn.Module]) -> nn.Module:
    model: Any = copy.deepcopy(teacher().module).eval()
    for i, operator in operators.items():
        model.blocks[i].set_submodule(kind, operator.eval())
    return model


def unsolved(case: Case) -> dict[int, tuple[nn.Module, list[Fit]]]:
    """The operators with their first weights, and what of them waits for data."""
    spec = SPECS[case.operator]
    kind = _kind(case)
    made: dict[int, tuple[nn.Module, list[Fit]]] = {}
    for i in SITES:
        site = next(s for s in analysis().sites if s.path == f"blocks.{i}.{kind}")
        facts = own_facts(site, ())
        arguments = arguments_at(spec, facts, case.arguments)
        torch.manual_seed(i)
        operator = build(spec, arguments).eval()
        sizes = [facts.get(n) for n in ("heads", "kv_heads", "head_dim")]
        heads = {SITE: Heads(*sizes)} if all(isinstance(f, int) for f in sizes) else {}  # type: ignore[arg-type]
        origins = initialise(
            operator, spec, arguments, site.role, case.clauses, {SITE: site_parts(analysis(), site)},
            site.path, heads=heads,
        )  # fmt: skip
        made[i] = operator, list(dict.fromkeys(o.fit for o in origins if o.fit))
    return made


def start(case: Case) -> dict[int, nn.Module]:
    """The operators with their first weights, solved where they ask for it."""
    kind = _kind(case)
    made: dict[int, nn.Module] = {}
    if case is CONSTANT:
        return {i: Mean(activations(kind)["train"][i][1][:CALIBRATION]) for i in SITES}
    for i, (operator, fits) in unsolved(case).items():
        x, y = activations(kind)["train"][i]
        batches = [
            ((a,), b)
            for a, b in zip(x[:CALIBRATION].split(BATCH), y[:CALIBRATION].split(BATCH), strict=True)
        ]
        for fit in fits:
            if fit.policy == "keep_top":
                site = next(s for s in analysis().sites if s.path == f"blocks.{i}.{kind}")
                mlp = site_parts(analysis(), site)
                solve_keep_top(operator, fit.linear, fit.blocks, mlp, batches)
            elif fit.policy == "svd":
                solve_svd(operator, fit.blocks[0].module, fit.linear, batches)
            elif fit.policy == "alternating":
                solve_alternating(operator, fit.linear, fit.blocks, batches, sweeps=fit.sweeps)
            else:
                solve_least_squares(operator, fit.linear, batches)
        made[i] = operator
    return made


def _kind(case: Case) -> str:
    return PLACES.get(case.operator, "attn")


def site_errors(kind: str, operators: Mapping[int, nn.Module]) -> list[float]:
    found: list[float] = []
    for i, operator in operators.items():
        x, y = activations(kind)["held"][i]
        with torch.inference_mode():
            found.append(float((operator(x) - y).square().sum() / y.square().sum()))
    return found


def train(
    case: Case, operators: Mapping[int, nn.Module], steps: int, every: int = 20
) -> dict[int, list[float]]:
    """Stage 1 as the engine does it (L1, its rates and schedule); held-out site errors each `every` steps."""
    kind = _kind(case)
    data = activations(kind)["train"]
    schedule = Schedule(steps, warmup=max(1, steps // 20))
    groups = [
        Group(str(i), dict(o.named_parameters()), None, schedule) for i, o in operators.items()
    ]
    optimiser = Optimiser(case.optimiser, groups)
    scales = {
        i: Scale(float(y.abs().mean()), float(y.square().mean())) for i, (_, y) in data.items()
    }
    generator = torch.Generator().manual_seed(11)
    trace: dict[int, list[float]] = {}
    for step in range(steps):
        chosen = torch.randint(POOL, (BATCH,), generator=generator)
        optimiser.zero()
        for i, operator in operators.items():
            x, y = data[i]
            regression(operator(x[chosen]), y[chosen], Loss("l1"), scales[i]).backward()
            nn.utils.clip_grad_norm_(operator.parameters(), 1.0)
        optimiser.step(step)
        if (step + 1) % every == 0:
            trace[step + 1] = site_errors(kind, operators)
    return trace


def measure(case: Case) -> dict[str, Any]:
    """One row: errors of the sites and of the model's output at 0 steps and at the end of each budget."""
    began = time.process_time()
    first = start(case)
    kind = _kind(case)
    row: dict[str, Any] = {
        "operator": case.title, "policy": case.policy, "optimiser": case.optimiser,
        "seconds_to_start": round(time.process_time() - began, 1),
        "site_error": {"0": site_errors(kind, first)},
        "output_error": {"0": output_error(grafted(kind, first))},
        "trace": {},
    }  # fmt: skip
    for steps in BUDGETS if case.trained else ():
        operators = {i: copy.deepcopy(o) for i, o in first.items()}
        trace = train(case, operators, steps)
        row["trace"][str(steps)] = trace
        row["site_error"][str(steps)] = trace[steps]
        row["output_error"][str(steps)] = output_error(grafted(kind, operators))
    row["seconds"] = round(time.process_time() - began, 1)
    return row


def read() -> dict[str, Any]:
    if RESULTS.exists():
        return json.loads(RESULTS.read_text(encoding="utf-8"))
    return {"rows": {}, "frechet": {}, "machine": f"torch {torch.__version__}, 1 thread, CPU"}


def write(found: Mapping[str, Any]) -> None:
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(RESULTS)


def run_all(only: str | None = None) -> None:
    """Measure every case that has no row yet, or one of some steps only; with `only`, those whose key has that text."""
    for case in cases():
        if only is not None and only not in case.key:
            continue
        row = read()["rows"].get(case.key)
        wanted = {"0", *map(str, BUDGETS)} if case.trained else {"0"}
        if row is not None and wanted <= row["output_error"].keys():
            continue
        print(case.key, flush=True)
        row = measure(case)
        found = read()
        found["rows"][case.key] = row
        write(found)
        errors = {k: round(v["all"], 4) for k, v in row["output_error"].items()}
        print(f"  output error {errors}, {row['seconds']} s", flush=True)


FRECHET = (
    ("hyena_x(kernel = 17, causal = false)", "all fitted in turn"),
    ("sliding_window(window = 4)", "reused, v and out fitted"),
    ("linear_attention(feature = relu)", "reused, v and out fitted"),
    ("latent_attention(rank = 32)", "SVD of k and v, then v and out fitted"),
)


def run_frechet(only: str | None = None, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Four operators with their default first weights, 3 seeds of 2,000 samples: at 0 steps, then after stage 1."""
    from table_score import Protocol, score_seed

    protocol = Protocol(2000, (0, 1, 2))
    known = {case.key: case for case in cases()}
    for steps in (0, 400):
        for case in [known[f"{t} | {p}"] for t, p in FRECHET] + [CONSTANT] * (steps == 0):
            model: Callable[..., Any] | None = None
            for seed in seeds:
                key = f"{case.key} | {steps} | {seed}"
                if key in read()["frechet"] or (only is not None and only not in key):
                    continue
                if model is None:
                    operators = start(case)
                    if steps:
                        train(case, operators, steps)
                    model = grafted(_kind(case), operators)
                drawn = score_seed(model, task(), protocol, seed)
                found = read()
                found["frechet"][key] = drawn.distance
                found["frechet_protocol"] = str(protocol)
                write(found)
                print(key, drawn.distance, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "frechet", "table"))
    parser.add_argument("--only", metavar="TEXT", help="cases whose key has this text")
    parser.add_argument("--seed", type=int, choices=(0, 1, 2), help="of `frechet`: one alone")
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.what == "table":
        from first_weights_table import markdown

        (ROOT / "docs" / "first-weights.md").write_text(markdown(read()), encoding="utf-8")
        return
    seeds = (0, 1, 2) if words.seed is None else (words.seed,)
    run_all(words.only) if words.what == "run" else run_frechet(words.only, seeds)


if __name__ == "__main__":
    main()
