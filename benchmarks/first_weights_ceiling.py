"""What an operator can hold of what the teacher does: the default start, trained twice as long as stage 1 of the table.

    python benchmarks/first_weights_ceiling.py               # what is not yet in first_weights.json
    python benchmarks/first_weights_ceiling.py --only relu   # rows whose key has that text
    python benchmarks/first_weights_ceiling.py --together    # the same sites on the model's output

Both stop and go on where they were; `first_weights.py table` puts what they found on the page. A row takes
two to four minutes of one core.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import first_weights as measured
import torch
from first_weights import Case
from torch import Tensor, nn

from graftc.distillation.optim import Group, Optimiser, Schedule

LONG = 800
"""Steps of stage 1: beside 100 and 400 they show what more still bring."""
TOGETHER = 400
"""Steps of all sites at once on the model's output, after 400 of stage 1."""
WANTED = (
    ("hyena_x(kernel = 17, causal = false)", "all fitted in turn"),
    ("sliding_window(window = 4)", "reused, v and out fitted"),
    ("linear_attention(feature = relu)", "reused, v and out fitted"),
    ("hyena_se(kernel = 17, causal = false)", "all fitted in turn"),
    ("linear_attention(feature = elu1)", "reused, v and out fitted"),
    ("local_attention_2d(radius = 3, height = 8, width = 8)", "reused, v and out fitted"),
    ("hyena_x(kernel = 4, causal = true)", "all fitted in turn"),
    ("hyena_y(kernel = 17, causal = false)", "all fitted in turn"),
    ("linear_window_attention(window = 8)", "q, k, v, out reused"),
    ("linear_attention(feature = softmax_pair)", "reused, v and out fitted"),
    ("mamba2(head_dim = 16, causal = false)", "random, out fitted"),
)


def wanted(only: str | None) -> Iterator[Case]:
    known = {case.key: case for case in measured.cases()}
    for title, policy in WANTED:
        case = known[f"{title} | {policy}"]
        if only is None or only in case.key:
            yield case


def store(kind: str, case: Case, row: Mapping[str, Any]) -> None:
    found = measured.read()
    found.setdefault(kind, {})[case.key] = row
    measured.write(found)
    print(f"{kind}: {case.key}: output error {row['output_error']['all']:.4f}, {row['seconds']} s", flush=True)  # fmt: skip


def ceiling(case: Case) -> None:
    began = time.process_time()
    operators = measured.start(case)
    trace = measured.train(case, operators, LONG, every=LONG // 4)
    error = measured.output_error(measured.grafted("attn", operators))
    row = {"steps": LONG, "site_error": trace[LONG], "output_error": error, "trace": trace}
    store("ceiling", case, {**row, "seconds": round(time.process_time() - began, 1)})


def pool() -> tuple[dict[str, Tensor], Tensor]:
    """The training inputs of `first_weights.activations`' kind, noised anew, and the noise the teacher predicts."""
    generator = torch.Generator().manual_seed(20251122)
    digits = measured.Digits("train")
    index = torch.cat([torch.randperm(len(digits), generator=generator) for _ in range(2)])
    rows: list[dict[str, Tensor]] = []
    for piece in index[: measured.POOL].split(250):
        prepared = measured.task().prepare(digits.batch(piece), generator).inputs
        rows.append({name: prepared[name] for name in ("x", "t", "y")})
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    model: Any = measured.teacher().module
    with torch.inference_mode():
        made = torch.cat([model(*p)[:, :1] for p in zip(*(v.split(250) for v in inputs.values()), strict=True)])  # fmt: skip
    return inputs, made.clone()


def together(case: Case) -> None:
    """All sites at once on the squared error of the model's output: what is lost by training each alone."""
    began = time.process_time()
    operators = measured.start(case)
    measured.train(case, operators, 400, every=400)
    model = measured.grafted("attn", {i: copy.deepcopy(o) for i, o in operators.items()}).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    blocks: Any = model.get_submodule("blocks")
    sites: dict[int, nn.Module] = {i: blocks[i].attn for i in operators}
    for site in sites.values():
        for parameter in site.parameters():
            parameter.requires_grad_(True)
    schedule = Schedule(TOGETHER, warmup=TOGETHER // 20)
    groups = [Group(str(i), dict(s.named_parameters()), None, schedule) for i, s in sites.items()]
    optimiser = Optimiser(case.optimiser, groups)
    inputs, target = pool()
    generator = torch.Generator().manual_seed(11)
    for step in range(TOGETHER):
        chosen = torch.randint(measured.POOL, (measured.BATCH,), generator=generator)
        optimiser.zero()
        made = model(*(v[chosen] for v in inputs.values()))[:, :1]
        (made - target[chosen]).square().mean().div(target.square().mean()).backward()
        for site in sites.values():
            nn.utils.clip_grad_norm_(site.parameters(), 1.0)
        optimiser.step(step)
    row = {"steps": TOGETHER, "output_error": measured.output_error(model.eval())}
    store("together", case, {**row, "seconds": round(time.process_time() - began, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", help="rows whose key has this text")
    parser.add_argument("--together", action="store_true", help="all sites on the model's output")
    words = parser.parse_args()
    torch.set_num_threads(1)
    kind = "together" if words.together else "ceiling"
    for case in wanted(words.only):
        if case.key not in measured.read().get(kind, {}):
            together(case) if words.together else ceiling(case)


if __name__ == "__main__":
    main()
