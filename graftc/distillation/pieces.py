"""How a model that trains lies on the processes of a job: whole in each (DDP), or in pieces (FSDP2).

The units of a model in pieces are the largest modules that no captured graph copies: a unit gathers its parameters when it is
called and lets go of them afterwards, from whatever graph the call comes. What the few modules above them
own themselves (a table of positions) stays whole in every process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from graftc.diagnostics import fail
from graftc.distillation.cuts import calls_of
from graftc.distillation.optim import gradient_norm, named
from graftc.distillation.ranks import ALONE, Ranks
from graftc.distillation.targets import Cut


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor a process holds: `start` to `stop` of `total`.

    >>> len(Rows(2, 5, 8))
    3
    """

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Whole:
    """A model that every process has whole; with several, DDP takes the mean of their gradients."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    rows: Mapping[str, Rows]
    ranks: Ranks = ALONE

    def running(self, runner: nn.Module) -> Callable[..., Any]:
        """What a training step calls: `runner` is the module, or a graph captured from it."""
        if self.ranks.size == 1:
            return runner
        # The forward is straight-line code: each step uses the same parameters.
        return DistributedDataParallel(runner, static_graph=True)

    def collect(self) -> None:
        """Called after a backward pass: `parameters` have the mean of the processes' gradients."""

    def norm(self) -> Tensor:
        """The joint L2 norm of all gradients, a scalar tensor."""
        return gradient_norm(self.parameters.values())

    def give_back(self, module: nn.Module) -> bool:
        """Put the weights into `module`, which was given; says whether this process has them all."""
        return True


@dataclass(frozen=True)
class Pieces(Whole):
    """A model in pieces. `module` runs as the whole one does, in all processes at the same time.

    `parameters`: what this process holds of each, as plain parameters over the same memory, so that an
    optimiser needs to know nothing of pieces; `rows`: which part that is, of those that are not whole.
    """

    def running(self, runner: nn.Module) -> Callable[..., Any]:
        return runner

    def collect(self) -> None:
        held = dict(self.module.named_parameters())
        whole = [p for n, p in self.parameters.items() if n not in self.rows and p.requires_grad]
        self.ranks.add_gradients(whole)
        for parameter in whole:
            if parameter.grad is not None:
                parameter.grad /= self.ranks.size
        for name in self.rows:
            gradient: Any = held[name].grad
            self.parameters[name].grad = None if gradient is None else gradient.to_local()
            held[name].grad = None

    def norm(self) -> Tensor:
        apart = gradient_norm(p for n, p in self.parameters.items() if n in self.rows).double()
        whole = gradient_norm(p for n, p in self.parameters.items() if n not in self.rows).double()
        squares = apart.to(self.ranks.device).square()
        self.ranks.add([squares])
        return (squares + whole.to(squares).square()).sqrt()

    def give_back(self, module: nn.Module) -> bool:
        """Rank 0 has them, in its CPU's memory; elsewhere `module` is left without weights."""
        state: dict[str, Tensor] = {}
        for name, value in self.module.state_dict().items():
            piece: Any = value
            full: Tensor = piece.full_tensor() if hasattr(piece, "full_tensor") else value
            if self.ranks.first:
                state[name] = full.detach().cpu().clone()
        if not self.ranks.first:
            return False
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags[name])
        for name, buffer in self.module.named_buffers():  # those that a state leaves out, too
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._buffers[last] = buffer.cpu()
        return True


def held(module: nn.Module, ranks: Ranks, *, pieces: bool, cuts: Sequence[Cut] = ()) -> Whole:
    """The model as this process has it; in pieces, `module` is given its weights by `give_back` alone."""
    if pieces:
        return in_pieces(module, ranks, cuts)
    return Whole(module, dict(named(module.named_parameters())), {}, ranks)


def in_pieces(
    module: nn.Module, ranks: Ranks, cuts: Sequence[Cut] = (), *, frozen: bool = False
) -> Pieces:
    """Divide a model among the processes; `cuts` are those that graphs are captured with.

    The module itself is left on the meta device: a frame that the weights can be loaded into again
    (`load_state_dict(…, assign=True)`). A unit at a time goes to the device of `ranks`, so that the model
    need not fit there. Raises GraftError (G830) for a parameter that two units share, (G513) for a forward
    that cannot be read.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, share_comm_ctx

    names = _units(module, cuts)
    _check_shared(module, names)
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    running = copy.deepcopy(module, memo)
    module.to("meta")
    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
    units: list[Any] = []
    for name in names:
        unit = running.get_submodule(name)
        unit.register_forward_hook(_no_views)  # before the hooks of FSDP2
        scalars = {p for p in unit.parameters() if p.ndim == 0}
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        units.append(unit)
    share_comm_ctx(units)
    for _, tensor in _plain(running):
        tensor.data = tensor.data.to(ranks.device)
    parameters: dict[str, nn.Parameter] = {}
    rows: dict[str, Rows] = {}
    for name, held in running.named_parameters():
        if not hasattr(held, "to_local"):
            parameters[name] = held
            continue
        piece: Any = held
        local: Tensor = piece.to_local()
        parameters[name] = nn.Parameter(local.detach(), requires_grad=held.requires_grad)
        rows[name] = _rows(len(held), ranks)
        assert len(rows[name]) == len(local)
    if frozen:
        running.eval().requires_grad_(False)
    return Pieces(running, parameters, rows, ranks)


def _no_views(unit: nn.Module, given: Any, found: Any) -> Any:
    """A copy of what is a view: an operation in place on it would lose FSDP2's hook of the backward pass."""
    del unit, given

    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad and value._is_view():
            return value.clone()
        return value

    return tree_map(own, found)


def _rows(total: int, ranks: Ranks) -> Rows:
    """As `torch.chunk` divides: all pieces but the last ones have the same rows."""
    each = -(-total // ranks.size)
    start = min(total, each * ranks.rank)
    return Rows(start, min(total, start + each), total)


def _plain(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return ((name, t) for name, t in tensors if not hasattr(t, "to_local"))


def _units(module: nn.Module, cuts: Sequence[Cut]) -> list[str]:
    """The modules that a level on the way to a cut calls and that are no level themselves, with parameters."""
    found: dict[int, str] = {}

    def walk(path: str) -> None:
        for call in calls_of(module, path):
            if any(f"{cut.graph}.".startswith(f"{call}.") for cut in cuts):
                walk(call)
            elif any(True for _ in module.get_submodule(call).parameters()):
                found.setdefault(id(module.get_submodule(call)), call)

    walk("")
    names = list(found.values())
    return [n for n in names if not any(n != o and n.startswith(f"{o}.") for o in names)]


def _check_shared(module: nn.Module, units: Sequence[str]) -> None:
    owner: dict[int, str] = {}
    for unit in units:
        for name, parameter in module.get_submodule(unit).named_parameters():
            other = owner.setdefault(id(parameter), unit)
            if other != unit:
                fail("G830", f"`{unit}.{name}` cannot be divided: `{other}` uses it too", site=unit,
                     wanted="parameters of one module each", found="one that two modules share",
                     help="--parallel data; of a teacher, leave out --shard-teacher")  # fmt: skip
