"""The distillation targets of a build as frozen values; `docs/targets.md` specifies them.

`targets_file.py` reads and writes them. Nothing here imports torch: an editor or a scheduler can read
targets on a machine that trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union

import networkx as nx

from graftc.distillation.about import FirstWeight, Noise, PerSample
from graftc.weights.fit import Block

VERSION = 2


@dataclass(frozen=True)
class ModelInput:
    """A named input of the model: shape with dynamic dimensions by name, dtype, what it means."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str = "other"


@dataclass(frozen=True)
class CutInput:
    """The value that is `argument` (a position, or a keyword) of the call of module `call`."""

    name: str
    call: str
    argument: int | str


@dataclass(frozen=True)
class Cut:
    """A region of one graph: from named values to the tensor that the module `output` returns.

    `graph` is the path of the module whose forward makes the calls ('' is the root); `call` and
    `output` are full paths from the root. With `gate`, the factor that multiplies the output before
    it is added to the stream (adaLN) is a value of the cut too, between the inputs and the output.
    """

    graph: str
    inputs: tuple[CutInput, ...]
    output: str
    gate: bool = False


@dataclass(frozen=True)
class Pending:
    """Weights to solve from data before training: `linear` inside `module`, by `policy`.

    `alternating` solves `blocks` of `module` too, in turn, `sweeps` times over.
    """

    module: str
    linear: str
    policy: str = "least_squares"
    blocks: tuple[Block, ...] = ()
    sweeps: int = 0


@dataclass(frozen=True)
class Loss:
    """A site's regression loss. `delta` (Huber) is in units of the target's root mean square.

    `auto` is chosen from the target's measured kurtosis (`graftc.distillation.loss.chosen`).
    `mask_above`: entries of the target larger than so many root mean squares are left out.
    """

    kind: Literal["l1", "l2", "huber", "auto"] = "l2"
    weight: float = 1.0
    delta: float = 1.0
    normalise: bool = True
    mask_above: float | None = None


@dataclass(frozen=True)
class Budget:
    """How long a site trains; None leaves it to the engine (`docs/targets.md`, "Budgets").

    `data` is a share of a sized DATA, `samples` a count of distinct samples, `steps` optimiser steps;
    with 0 steps a site's pending weights are solved and nothing is trained. `clip` is the largest norm of
    the site's gradient; after `patience` validations without a better one, the site stops.
    """

    samples: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    data: float | None = None
    clip: float | None = None
    patience: int | None = None


@dataclass(frozen=True)
class Candidate:
    """What a site of `one of` can become: the first of a site's is in the student.

    `package`: the folder in the build that holds its module and first weights, a standalone package
    whose model takes `inputs`, by name among the teacher cut's; None for the first, and for `keep`.
    `pending` and `trainable`: as of a site, with paths from the root of that package. `arguments`, `definition`,
    `init` and `sample`: as of a site, with names as if this candidate were the student's.
    """

    operator: str
    package: str | None = None
    pending: tuple[Pending, ...] = ()
    inputs: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    definition: str = ""
    init: tuple[FirstWeight, ...] = ()
    sample: PerSample | None = None


@dataclass(frozen=True)
class Site:
    """One distillation site: the teacher's cut, the student's cut, and how to train the second.

    `arguments`: all of the operator's, defaults too. `definition`: what computes (a class, or a hash of an
    operator that is written in a file). `init`: where each new parameter begins.
    `student_inputs`: the share of each batch that enters the site as the student model itself has it
    at that cut, and not as the teacher has it: at the first step, and at the last.
    """

    name: str
    teacher: Cut
    student: Cut
    trainable: tuple[str, ...]
    rule: str = ""
    origin: str = ""
    operator: str = ""
    pending: tuple[Pending, ...] = ()
    loss: Loss = field(default_factory=Loss)
    budget: Budget = field(default_factory=Budget)
    after: tuple[str, ...] = ()
    exact: bool = False
    candidates: tuple[Candidate, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    definition: str = ""
    init: tuple[FirstWeight, ...] = ()
    sample: PerSample | None = None
    student_inputs: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Only:
    """Only the parameters under these prefixes."""

    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear layer, merged at the end; `alpha` None is `rank`."""

    rank: int
    alpha: float | None = None


Train = Union[Literal["all", "inserted"], Only, Lora]


@dataclass(frozen=True)
class Stage2:
    """End-to-end finetuning. The defaults are the paper's (arXiv 2506.05340, section 2).

    `task`, `teacher` and `features` are the weights of the loss's terms: the task's own loss, the
    teacher's output, the outputs of the sites. `checkpointing` computes the blocks' inner values again
    in the backward pass; `preview` is a number of steps between two sheets of samples.
    """

    data: float | None = None
    samples: int | None = None
    steps: int | None = None
    epochs: float | None = None
    batch: int | None = None
    lr: float = 1e-4
    warmup: int = 1000
    ema: float = 0.9999
    clip: float = 1.0
    halve_lr_at: tuple[int, ...] = ()
    train: Train = "all"
    task: float = 1.0
    teacher: float = 0.0
    features: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    preview: int | None = None


@dataclass(frozen=True)
class Targets:
    """The whole file.

    >>> cut = Cut("", (CutInput("x", "mlp", 0),), "mlp")
    >>> targets = Targets((), (Site("mlp", cut, cut, ("mlp",)), Site("b", cut, cut, ("mlp",), after=("mlp",))))
    >>> [[site.name for site in group] for group in targets.generations()]
    [['mlp'], ['b']]
    """

    inputs: tuple[ModelInput, ...]
    sites: tuple[Site, ...]
    stage2: Stage2 = field(default_factory=Stage2)
    version: int = VERSION
    noise: Noise | None = None

    def generations(self) -> tuple[tuple[Site, ...], ...]:
        """The sites in the order they are distilled: each group needs only the groups before it."""
        sites = {site.name: site for site in self.sites}
        order = nx.DiGraph()
        order.add_nodes_from(sites)
        order.add_edges_from((before, s.name) for s in self.sites for before in s.after)
        rank = {name: i for i, name in enumerate(sites)}
        return tuple(
            tuple(sites[name] for name in sorted(group, key=rank.__getitem__))
            for group in nx.topological_generations(order)
        )
