"""`targets.yaml` read and written: plain data to the values of `targets.py`, checked on the way in.

The file is specified in `docs/targets.md`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import networkx as nx
import yaml

from graftc.diagnostics import fail, nearest
from graftc.distillation.about import first_weights, noise, per_sample, plain_mapping
from graftc.distillation.reader import Table
from graftc.distillation.targets import (
    Budget,
    Candidate,
    Cut,
    CutInput,
    Lora,
    Loss,
    ModelInput,
    Only,
    Pending,
    Site,
    Stage2,
    Targets,
    Train,
)
from graftc.weights.fit import Block

READ = (1, 2)
"""Versions that are read: the first says nothing of arguments, first weights, sizes and the noise."""

LOSSES = ("l1", "l2", "huber", "auto")
PRECISIONS = ("float32", "bfloat16")
FILE = "targets.yaml"


def load_targets(directory: str | Path) -> Targets:
    """The targets of the build at `directory` (or of the file itself).

    Raises GraftError: no such file (G500), not YAML (G501), not valid targets (G502), made for
    another version (G503).
    """
    path = Path(directory)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        fail("G500", f"no such file: {path}", site=str(path), help="run `graftc compile` first")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        fail("G501", f"`{path.name}` is not YAML: {first}", site=str(path))
    return from_dict(data, str(path))


def save_targets(targets: Targets, directory: str | Path) -> Path:
    """Write `targets.yaml` into `directory`; returns its path."""
    path = Path(directory) / FILE
    text = yaml.safe_dump(to_dict(targets), sort_keys=False, width=100, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def to_dict(targets: Targets) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings, ready for YAML; every field is written.

    >>> from graftc.distillation.targets import Cut, CutInput, Site, Targets
    >>> cut = Cut("", (CutInput("x", "mlp", 0),), "mlp")
    >>> targets = Targets((), (Site("mlp", cut, cut, ("mlp",)),))
    >>> plain = to_dict(targets)
    >>> to_dict(from_dict(plain)) == plain
    True
    """
    plain: dict[str, Any] = {"version": targets.version}
    plain["inputs"] = [_plain(i) for i in targets.inputs]
    plain["noise"] = _plain(targets.noise)
    plain["sites"] = [_plain(s) for s in targets.sites]
    plain["stage2"] = _plain(targets.stage2)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Lora):
        return {"lora": {"rank": value.rank, "alpha": value.alpha}}
    if isinstance(value, Only):
        return {"only": list(value.prefixes)}
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType]


def from_dict(data: Any, where: str = FILE) -> Targets:
    """Targets from plain data, checked: types, names, references, order. Raises GraftError."""
    top = Table(data, where)
    version = top.integer("version")
    if version not in READ:
        fail("G503", f"targets of version {version}", site=where, wanted=" or ".join(map(str, READ)),
             found=str(version), help="compile again with this graftc")  # fmt: skip
    inputs = tuple(_input(t) for t in top.tables("inputs"))
    sites = tuple(_site(t) for t in top.tables("sites"))
    stage2 = _stage2(top.table("stage2")) if top.has("stage2") else Stage2()
    drawn = noise(top)
    top.done()
    targets = Targets(inputs, sites, stage2, noise=drawn)
    _check(targets, where)
    return targets


def _input(table: Table) -> ModelInput:
    made = ModelInput(
        table.text("name"),
        tuple(table.sizes("shape")),
        table.text("dtype"),
        table.text("meaning", "other"),
    )
    table.done()
    return made


def _cut(table: Table) -> Cut:
    inputs: list[CutInput] = []
    for row in table.tables("inputs"):
        inputs.append(CutInput(row.text("name"), row.text("call"), row.argument("argument")))
        row.done()
    gate = table.boolean("gate", False)
    made = Cut(table.text("graph", ""), tuple(inputs), table.text("output"), gate)
    if not inputs:
        table.wrong("inputs", "a cut has at least one input")
    if len({i.name for i in inputs}) < len(inputs):
        table.wrong("inputs", "two inputs of one cut have the same name")
    inside = f"{made.graph}." if made.graph else ""
    for path in (*(i.call for i in inputs), made.output):
        if not path.startswith(inside) or path == inside:
            table.wrong("graph", f"`{path}` is not inside the graph `{made.graph}`")
    table.done()
    return made


def _pending(table: Table) -> tuple[Pending, ...]:
    found: list[Pending] = []
    for row in table.tables("pending", ()):
        blocks = tuple(
            Block(b.text("module"), b.integer("start"), b.integer("stop"))
            for b in row.tables("blocks", ())
        )
        policy = row.text("policy", "least_squares")
        sweeps = row.integer("sweeps", 0)
        found.append(Pending(row.text("module"), row.text("linear"), policy, blocks, sweeps))
        row.done()
    return tuple(found)


def _candidates(table: Table) -> tuple[Candidate, ...]:
    found: list[Candidate] = []
    for row in table.tables("candidates", ()):
        found.append(
            Candidate(
                row.text("operator"),
                row.text("package", "") or None,
                _pending(row),
                tuple(row.texts("inputs", ())),
                tuple(row.texts("trainable", ())),
                plain_mapping(row, "arguments"),
                row.text("definition", ""),
                first_weights(row),
                per_sample(row),
            )
        )
        row.done()
    return tuple(found)


def _site(table: Table) -> Site:
    site = Site(
        name=table.text("name"),
        teacher=_cut(table.table("teacher")),
        student=_cut(table.table("student")),
        trainable=tuple(table.texts("trainable")),
        rule=table.text("rule", ""),
        origin=table.text("origin", ""),
        operator=table.text("operator", ""),
        pending=_pending(table),
        loss=_loss(table.table("loss")) if table.has("loss") else Loss(),
        budget=_budget(table.table("budget")) if table.has("budget") else Budget(),
        after=tuple(table.texts("after", ())),
        exact=table.boolean("exact", False),
        candidates=_candidates(table),
        arguments=plain_mapping(table, "arguments"),
        definition=table.text("definition", ""),
        init=first_weights(table),
        sample=per_sample(table),
        student_inputs=_shares(table),
    )
    if site.student.gate:
        table.wrong(
            "student", "`gate` is for the teacher's cut: the student's loss is weighted with it"
        )
    known = {i.name for i in site.teacher.inputs}
    for given in site.student.inputs:
        if given.name not in known:
            table.wrong("student", f"input `{given.name}` is not among the teacher's: {known}")
    for candidate in site.candidates:
        for name in candidate.inputs:
            if name not in known:
                table.wrong("candidates", f"input `{name}` is not among the teacher's: {known}")
    if not site.trainable and not site.exact:
        table.wrong("trainable", "a site that is not exact has something to train")
    table.done()
    return site


def _shares(table: Table) -> tuple[float, float]:
    """The share of the student's own inputs at the first step and at the last."""
    given = table.numbers("student_inputs", (0.0, 0.0))
    if len(given) != 2 or not all(0 <= share <= 1 for share in given):
        table.wrong("student_inputs", "`student_inputs` is two shares from 0 to 1: [first, last]")
    return given[0], given[1]


def _loss(table: Table) -> Loss:
    made = Loss(
        table.choice("kind", LOSSES, "l2"),  # pyright: ignore[reportArgumentType]
        table.positive("weight", 1.0),
        table.positive("delta", 1.0),
        table.boolean("normalise", True),
        table.optional_positive("mask_above"),
    )
    table.done()
    return made


def _amounts(table: Table) -> dict[str, Any]:
    return {
        "samples": table.count("samples"),
        "epochs": table.optional_positive("epochs"),
        "steps": table.count("steps", least=0),
        "batch": table.count("batch"),
        "data": table.fraction("data"),
    }


def _budget(table: Table) -> Budget:
    made = Budget(
        **_amounts(table),
        lr=table.optional_positive("lr"),
        clip=table.optional_positive("clip"),
        patience=table.count("patience"),
    )
    table.done()
    return made


def _stage2(table: Table) -> Stage2:
    train: Train = "all"
    given = table.take("train", "all")
    if isinstance(given, Mapping) and "only" in given:
        only = Table(given, table.at("train"))  # pyright: ignore[reportUnknownArgumentType]
        train = Only(tuple(only.texts("only")))
        only.done()
    elif isinstance(given, Mapping):
        lora = Table(given, table.at("train")).table("lora")  # pyright: ignore[reportUnknownArgumentType]
        train = Lora(lora.count("rank") or 8, lora.optional_positive("alpha"))
        lora.done()
    elif given in ("all", "inserted"):
        train = given
    else:
        table.wrong("train", "train is `all`, `inserted`, `{only: […]}` or `{lora: {rank: 8}}`")
    made = Stage2(
        **_amounts(table),
        lr=table.positive("lr", 1e-4),
        warmup=table.integer("warmup", 1000),
        ema=table.share("ema", 0.9999),
        clip=table.positive("clip", 1.0),
        halve_lr_at=tuple(table.integers("halve_lr_at", ())),
        train=train,
        task=table.weight("task", 1.0),
        teacher=table.weight("teacher", 0.0),
        features=table.weight("features", 0.0),
        precision=table.choice("precision", PRECISIONS, "float32"),  # pyright: ignore[reportArgumentType]
        checkpointing=table.boolean("checkpointing", False),
        preview=table.count("preview"),
    )
    if not made.task + made.teacher + made.features > 0:
        table.wrong("task", "every term of stage 2 has the weight 0: `task`, `teacher`, `features`")
    table.done()
    return made


def _check(targets: Targets, where: str) -> None:
    """What no single table can tell: unique names, known references, an order that exists."""
    names = [s.name for s in targets.sites]
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        fail("G502", f"two sites are called `{twice}`", site=f"{where}: sites")
    for site in targets.sites:
        for before in site.after:
            if before not in names:
                near = nearest(before, names)
                fail("G502", f"`{site.name}` comes after `{before}`, which is no site",
                     site=f"{where}: sites", help=f"write `{near}`" if near else None)  # fmt: skip
    try:
        targets.generations()
    except nx.NetworkXUnfeasible:
        fail("G502", "sites wait for each other: `after` has a cycle", site=f"{where}: sites")
