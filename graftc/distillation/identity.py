"""What makes a trained site what it is: the parts of its key in a bank, as plain data.

Two keys: `problem` is what a build says (teacher, cut, operator, first weights, loss, budget), and is
known at compile; `training` is what a run adds (data and noise, seed, steps, optimiser).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from graftc.diagnostics import fail
from graftc.distillation.budget import site_plans
from graftc.distillation.candidates import candidate_name, candidate_site
from graftc.distillation.data import Task, open_data
from graftc.distillation.targets import Candidate, Site, Targets
from graftc.distillation.targets_file import to_dict

_NOT_KEY = ("name", "rule", "origin", "operator", "teacher", "student", "trainable", "pending", "after", "exact", "candidates", "sample", "init")  # fmt: skip
"""Fields of a site that its key has in another form, or that change nothing of what is trained."""

_NOT_TRAINING = (
    "site_by_site",
    "cache",
    "seed",
    "steps",
    "batch",
    "lr",
    "samples",
    "threads",
    "stacked",
)
"""Options of a run that its plan already says, or that change a sum's rounding at most."""


class KnownBuild(Protocol):
    """What a key needs of a build (`graftc.emit.build.Build`)."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def targets(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Identity:
    """A site, or a candidate of one, as a bank knows it."""

    site: str
    candidate: int
    operator: str
    problem: Mapping[str, Any]
    training: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """What stage 1 calls it."""
        return candidate_name(self.site, self.candidate)

    @property
    def problem_key(self) -> str:
        return digest(self.problem)

    @property
    def key(self) -> str:
        """The whole key. Raises ValueError where no run is meant."""
        if self.training is None:
            raise ValueError("a key needs a run's part")
        return digest({"problem": self.problem_key, "training": self.training})


def digest(data: Any) -> str:
    """A hash of plain data, the same on every machine.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": (2,), "a": 1})
    True
    """
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def problems(
    build: KnownBuild, targets: Targets, sources: Mapping[str, Any] | None = None
) -> tuple[Identity, ...]:
    """The problem of every site that trains and of every candidate, in the order of the targets.

    `sources` are the run's: first weights that were solved at compile on other data are part of the key.
    A site whose inputs come from the student while it trains has none: what it becomes hangs on all others.
    Raises GraftError (G575) for a build that does not say enough.
    """
    teacher = _teacher(build)
    first = _first_weights(build, sources)
    found: dict[str, Identity] = {}
    made: list[Identity] = []
    for site in (s for group in targets.generations() for s in group):
        if site.exact and not site.candidates:
            continue
        if not site.definition:
            fail("G575", "these targets do not say enough to know a trained site again",
                 site=f"{build.path}/targets.yaml: {site.name}", wanted="targets of version 2",
                 help="compile again with this graftc")  # fmt: skip
        if any(share > 0 for share in getattr(site, "student_inputs", ())):
            continue
        if any(name not in found for name in site.after):
            continue
        after = [found[name].problem_key for name in site.after]
        own: list[tuple[int, Site, Candidate | None]] = [] if site.exact else [(0, site, None)]
        own += [(i, candidate_site(site, i), c) for i, c in enumerate(site.candidates) if c.package]
        for index, one, candidate in own:
            problem = {
                "version": 1,
                "teacher": teacher,
                "cut": _cut(site, one),
                "init": {**first, "weights": _init(one)},
                "trains": _trains(site, one, candidate),
                "after": after,
                **_rest(one),
            }
            made.append(Identity(site.name, index, one.operator, problem))
            if index == 0:
                found[site.name] = made[-1]
    order = {s.name: i for i, s in enumerate(targets.sites)}
    return tuple(sorted(made, key=lambda i: (order[i.site], i.candidate)))


def trained(
    identities: Sequence[Identity],
    targets: Targets,
    *,
    data: str,
    size: int | None,
    options: Mapping[str, Any],
) -> tuple[Identity, ...]:
    """The same with what a run adds: `data` is its fingerprint, `options` are the run's."""
    rest = {k: v for k, v in options.items() if k not in _NOT_TRAINING and v is not None}
    by_name = {i.name: i for i in identities}
    given = {k: options.get(k) for k in ("steps", "batch", "lr")}
    keys: dict[str, str] = {}
    made: dict[str, Identity] = {}
    for sites in targets.generations():
        plans = site_plans(sites, size, **given)
        for site in sites:
            for index in range(max(1, len(site.candidates))):
                if (i := by_name.get(candidate_name(site.name, index))) is None:
                    continue
                training = {
                    "data": data,
                    "size": size,
                    "seed": options["seed"],
                    **vars(plans[site.name]),
                    **rest,
                    "after": [keys[name] for name in site.after],
                }
                made[i.name] = replace(i, training=training)
                keys[i.name] = made[i.name].key
    return tuple(made[i.name] for i in identities)


def fingerprint(data: Any, task: Task, validation: Any = None) -> str:
    """DATA and the task's noise by content: the number of samples, the held-out ones, a batch as prepared.

    Random draws of a task that does not take them from its generator are held still.
    """
    opened = open_data(data, seed=0, validation=validation)
    found = hashlib.sha256(repr(opened.size).encode())
    for sample in opened.held_out:
        _hash_tensors(found, sample)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prepared = opened.prepared(task, 0, min(8, opened.size or 8), "bank")
    _hash_tensors(found, prepared.inputs)
    return found.hexdigest()[:32]


def _hash_tensors(found: Any, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat: Any = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
        found.update(memoryview(flat))


def _teacher(build: KnownBuild) -> dict[str, str]:
    """Code and weights: another model of the same weights is another teacher, and the other way round."""
    weights = (build.manifest.get("weights") or {}).get("teacher")
    code = build.path / "teacher" / "model.py"
    if not weights or not code.is_file():
        fail("G575", "this build does not say which teacher it was made of", site=str(build.path),
             wanted="`weights.teacher` in manifest.yaml, and teacher/model.py",
             help="compile again with this graftc")  # fmt: skip
    return {"code": hashlib.sha256(code.read_bytes()).hexdigest(), "weights": str(weights)}


def _first_weights(build: KnownBuild, sources: Mapping[str, Any] | None) -> dict[str, Any]:
    """What decides the first weights beside the site's own `init`: seed, a file, data they were solved on."""
    manifest = build.manifest
    given: Mapping[str, Any] = manifest.get("student_weights") or {}
    compiled = (manifest.get("data") or {}).get("sha256")
    used = ((sources or {}).get("data") or {}).get("sha256", compiled)
    return {
        "seed": manifest.get("seed", 0),
        "file": given.get("sha256"),
        "solved_on": compiled if compiled != used else None,
    }


def _cut(site: Site, one: Site) -> dict[str, Any]:
    """The teacher's values that this operator reads and is compared with."""
    names = {i.name for i in one.student.inputs}
    plain = _plain(site)["teacher"]
    return {**plain, "inputs": [i for i in plain["inputs"] if i["name"] in names]}


def _init(one: Site) -> list[Any]:
    return [[w.parameter, w.source, w.pending, w.rows] for w in one.init]


def _trains(site: Site, one: Site, candidate: Candidate | None) -> list[str]:
    """Prefixes of what trains, as if the candidate were the student's."""
    if candidate is None:
        return sorted(one.trainable)
    root = one.student.output
    return sorted(site.teacher.output + name.removeprefix(root) for name in one.trainable)


def _rest(one: Site) -> dict[str, Any]:
    """Loss, budget, arguments, definition, and whatever else a site may come to say."""
    return {k: v for k, v in _plain(one).items() if k not in _NOT_KEY}


def _plain(site: Site) -> dict[str, Any]:
    return cast("dict[str, Any]", to_dict(Targets((), (site,)))["sites"][0])
