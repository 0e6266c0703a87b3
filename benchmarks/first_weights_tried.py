"""What was tried to make first weights better than the defaults, by the model's output error and without a step.

    python benchmarks/first_weights_tried.py                              # what is not yet in first_weights.json
    python benchmarks/first_weights_tried.py --only 'sliding_window'      # rows whose key has that text

A row takes 5 to 30 s of one core. `first_weights.py table` puts what was found on the page.

weights  each calibration token's share in the normal equations: `output`, the squared gradient of the predicted noise
         at the site (one random probe a sample, averaged over bins of 50 timesteps); `gate`, that of the adaLN gate
         after it; `early`, four times as much at t <= 250.
inputs   `own`: site by site along the model, each fitted to the teacher's output given what the student feeds it;
         `stream`: and to what makes up for the stream's difference before it.
refit    the last map is fitted after each sweep too, and the next sweep aims at what it would then have to read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import first_weights as measured
import torch
from first_weights import BATCH, SITES
from first_weights_cases import Case, cases
from torch import Tensor, nn

from graftc.weights import alternating
from graftc.weights.fit import Block, Fit

EARLY = 250


@dataclass(frozen=True)
class Variation:
    """A way to fit, beside the default: 2 sweeps, 512 samples, the teacher's inputs, all tokens alike."""

    weights: Literal["none", "output", "gate", "early"] = "none"
    inputs: Literal["teacher", "own", "stream"] = "teacher"
    samples: int = 512
    sweeps: int = 0
    ridge: float = 1e-4
    refit: bool = False

    @property
    def name(self) -> str:
        plain = Variation()
        said = [f"{k} {v}" for k, v in vars(self).items() if v != getattr(plain, k)]
        return ", ".join(said) or "default"


OPERATORS = {
    "hyena_x(kernel = 17, causal = false)": "all fitted in turn",
    "sliding_window(window = 4)": "reused, v and out fitted",
    "linear_attention(feature = relu)": "reused, v and out fitted",
    "local_attention_2d(radius = 3, height = 8, width = 8)": "reused, v and out fitted",
    "hyena_y(kernel = 17, causal = false)": "all fitted in turn",
    "hyena_se(kernel = 17, causal = false)": "all fitted in turn",
    "hyena_x(kernel = 4, causal = true)": "all fitted in turn",
}
TRIED = (
    Variation(),
    Variation("output"),
    Variation("gate"),
    Variation("early"),
    Variation(inputs="own"),
    Variation("output", "own"),
    Variation(inputs="stream"),
    Variation("output", "stream"),
    Variation(samples=1536),
    Variation(ridge=1e-2),
    Variation(refit=True),
    Variation(sweeps=6, refit=True),
    Variation(sweeps=4, refit=True),
    Variation(sweeps=4),
    Variation(sweeps=8),
)


@cache
def pool() -> dict[str, Any]:
    """3,000 noised inputs: what each site reads and gives, its gate, and how much the output feels it."""
    module: Any = measured.teacher().module
    generator = torch.Generator().manual_seed(20251121)
    probes = torch.Generator().manual_seed(3)
    digits = measured.Digits("train")
    index = torch.cat([torch.randperm(len(digits), generator=generator) for _ in range(3)])
    rows: dict[str, list[Any]] = {"inputs": [], "x": [], "y": [], "felt": [], "gate": []}
    for piece in index[: measured.POOL].split(250):
        given = measured.task().prepare(digits.batch(piece), generator).inputs
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(i: int, seen: dict[int, tuple[Tensor, Tensor]] = seen) -> Any:
            return lambda _, read, made: seen.update({i: (read[0], made)})

        handles = [module.blocks[i].attn.register_forward_hook(keep(i)) for i in SITES]
        noise = module.requires_grad_(True)(**given)[:, :1]
        for handle in handles:
            handle.remove()
        probe = torch.randint(0, 2, noise.shape, generator=probes).float() * 2 - 1
        felt = torch.autograd.grad((noise * probe).sum(), [seen[i][1] for i in SITES])
        with torch.no_grad():
            condition = module.t_embedder(given["t"]) + module.y_embedder(given["y"])
            gates = [module.blocks[i].adaLN_modulation(condition).chunk(6, 1)[2] for i in SITES]
        rows["inputs"].append(given)
        rows["x"].append([seen[i][0].detach() for i in SITES])
        rows["y"].append([seen[i][1].detach() for i in SITES])
        rows["felt"].append([f.square().mean((1, 2)) for f in felt])
        rows["gate"].append([g[:, None] for g in gates])
    names = rows["inputs"][0].keys()
    found: dict[str, Any] = {
        "inputs": {n: torch.cat([r[n] for r in rows["inputs"]]) for n in names}
    }
    for name in ("x", "y", "felt", "gate"):
        found[name] = {i: torch.cat([r[at] for r in rows[name]]) for at, i in enumerate(SITES)}
    return found


def shares(how: Variation, block: int) -> Tensor | None:
    """The weight of each sample [B, 1, 1], 1 on average."""
    data, count = pool(), how.samples
    times = data["inputs"]["t"][:count]
    if how.weights == "none":
        return None
    if how.weights == "early":
        found = 1 + 3 * (times <= EARLY).float()
    elif how.weights == "gate":
        found = data["gate"][block][:count].square().mean((1, 2))
    else:
        found = data["felt"][block][:count].clone()
    if how.weights != "early":
        for place in (times // 50).unique():
            found[times // 50 == place] = found[times // 50 == place].mean()
    return (found / found.mean())[:, None, None]


def site_inputs(how: Variation, block: int, made: dict[int, nn.Module]) -> tuple[Tensor, Tensor]:
    """What a site is fitted on: its inputs, and what it shall give."""
    data, count = pool(), how.samples
    x, y = data["x"][block][:count], data["y"][block][:count]
    if how.inputs == "teacher" or not made:
        return x, y
    x, stream = _before(measured.grafted("attn", made), block, count)
    if how.inputs == "own":
        return x, y
    _, wanted = _before(measured.teacher().module, block, count)
    gate = data["gate"][block][:count]
    return x, y + (wanted - stream) * gate / (gate.square() + 0.1 * gate.square().mean())


def _before(model: Any, block: int, count: int) -> tuple[Tensor, Tensor]:
    """What the site of a block reads, and the stream that enters the block."""
    read: list[Tensor] = []
    entered: list[Tensor] = []
    at = model.blocks[block]
    handles = (
        at.attn.register_forward_hook(lambda _, given, made: read.append(given[0])),
        at.register_forward_hook(lambda _, given, made: entered.append(given[0])),
    )
    with torch.no_grad():
        for start in range(0, count, 256):
            model(**{n: v[start : min(count, start + 256)] for n, v in pool()["inputs"].items()})
    for handle in handles:
        handle.remove()
    return torch.cat(read).detach(), torch.cat(entered).detach()


Pieces = Sequence[tuple[Tensor, Tensor, Tensor | None]]


def fit(module: nn.Module, what: Fit, pieces: Pieces, how: Variation) -> None:
    """`solve_alternating` with weighted rows."""
    linear: Any = module.get_submodule(what.linear)
    first = pieces[: max(1, alternating.ROWS // (BATCH * pieces[0][0].shape[1]))]
    wanted: list[Tensor] = []
    with torch.no_grad():
        for sweep in range(how.sweeps or what.sweeps):
            if sweep == 0 or how.refit:
                back = torch.linalg.pinv(linear.weight.double())
                wanted = [((y.double() - linear.bias.double()) @ back.T).to(y) for _, y, _ in first]
            for block in what.blocks:
                _fit_block(module, what.linear, block, first, wanted, how.ridge)
            if how.refit:
                _fit_last(module, what.linear, first)
        _fit_last(module, what.linear, pieces)


def _fit_last(module: nn.Module, last: str, pieces: Pieces) -> None:
    linear: Any = module.get_submodule(last)
    width = linear.in_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment = torch.zeros(width, linear.out_features, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for x, y, share in pieces:
        module(x)
        z = seen.pop()
        z = torch.cat([z, torch.ones_like(z[..., :1])], -1).double()
        weighed = (z if share is None else z * share).flatten(0, -2)
        gram += weighed.T @ z.flatten(0, -2)
        moment += weighed.T @ y.flatten(0, -2).double()
    handle.remove()
    ridge = torch.full((width,), 1e-6, dtype=torch.float64) * gram.diagonal()[:-1].mean()
    ridge[-1] = 0
    solved = torch.linalg.solve(gram + ridge.diag(), moment).T
    linear.weight.copy_(solved[:, :-1])
    linear.bias.copy_(solved[:, -1])


def _fit_block(
    module: nn.Module,
    last: str,
    block: Block,
    pieces: Pieces,
    wanted: Sequence[Tensor],
    ridge: float,
) -> None:
    owner = module.get_submodule(block.module)
    weight = owner.get_parameter("weight")
    bias = dict(owner.named_parameters()).get("bias")
    rows, channels = slice(block.start, block.stop), block.stop - block.start
    columns = weight[rows].flatten(1).shape[1]
    size = columns + (bias is not None)
    gram = torch.zeros(channels, size, size, dtype=torch.float64)
    moment = torch.zeros(channels, size, dtype=torch.float64)
    for (x, _, share), target in zip(pieces, wanted, strict=True):
        constant, *each = alternating._features(module, last, block, (x,))  # pyright: ignore[reportPrivateUsage]
        features = torch.stack([(c - constant).flatten(0, -2).T for c in each], dim=1)
        left = (target - constant).flatten(0, -2).T.unsqueeze(-1)
        weighed = features
        if share is not None:
            weighed = features * share.expand(*target.shape[:-1], 1).flatten(0, -2).T.unsqueeze(1)
        gram += weighed @ features.transpose(1, 2)
        moment += (weighed @ left).squeeze(-1)
    scale = ridge * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    solved = torch.linalg.solve(gram + scale[:, None, None] * torch.eye(size).to(gram), moment)
    weight[rows] = solved[:, :columns].reshape(weight[rows].shape).to(weight)
    if bias is not None:
        bias[rows] = solved[:, -1].to(bias)


def measure(case: Case, how: Variation) -> dict[str, Any]:
    began = time.process_time()
    made: dict[int, nn.Module] = {}
    for block, (operator, fits) in measured.unsolved(case).items():
        x, y = site_inputs(how, block, made)
        share = shares(how, block)
        parts = [None] * -(-len(x) // BATCH) if share is None else share.split(BATCH)
        pieces = list(zip(x.split(BATCH), y.split(BATCH), parts, strict=True))
        for what in fits:
            fit(operator, what, pieces, how)
        made[block] = operator
    error = measured.output_error(measured.grafted("attn", made))
    return {"output_error": error, "site_error": measured.site_errors("attn", made),
            "seconds": round(time.process_time() - began, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", help="rows whose key has this text")
    parser.add_argument("--exact", action="store_true", help="the row whose key is that text")
    words = parser.parse_args()
    torch.set_num_threads(1)
    known = {case.key: case for case in cases()}
    for title, policy in OPERATORS.items():
        for how in TRIED:
            key = f"{title} | {how.name}"
            chosen = key == words.only if words.exact else (words.only or "") in key
            if not chosen or key in measured.read().get("tried", {}):
                continue
            row = measure(known[f"{title} | {policy}"], how)
            found = measured.read()
            found.setdefault("tried", {})[key] = row
            measured.write(found)
            print(key, round(row["output_error"]["all"], 4), f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
