"""What `fold(n)` claims: every map that writes the residual stream that a norm reads, and the norm's readers.

The stream is all values that hang together by additions and movements. LayerNorm does not see a mean that all
features of a token share, so it can be taken out of each writer, if nothing but such norms reads the stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from graftc.diagnostics import Note, Span, fail
from graftc.program.analysis import Analysis, Site
from graftc.program.flat import Op
from graftc.program.ops import CONVS, LINEARS, MOVEMENTS, NORMS
from graftc.program.program import ATEN, Program, size_hint, tensor_of
from graftc.rewrite.norms import affine_tail

_SPLITS = frozenset(
    {
        ATEN.chunk.default, ATEN.split.Tensor, ATEN.split_with_sizes.default, ATEN.unbind.int,
        ATEN.tensor_split.sections, ATEN.split.sizes, ATEN.repeat_interleave.self_int,
    }
)  # fmt: skip
_MOVES = MOVEMENTS - _SPLITS
_SIZES = (ATEN.sym_size.int, getattr)
_LAYER_NORM = ATEN.layer_norm.default


@dataclass(frozen=True)
class StreamFold:
    """Parameters by name. `writers`: (name, the axis over which its mean is taken out); `readers`: (weight,
    bias or None, stored transposed) of the linears that read the norm; `scale` and `shift` are the norm's own.
    """

    writers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, str | None, bool], ...]
    scale: str | None
    shift: str | None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that get other weights."""
        names = [*(n for n, _ in self.writers), *(w for w, _, _ in self.readers)]
        return tuple(dict.fromkeys(n.rpartition(".")[0] for n in names))


def stream_fold(analysis: Analysis, site: Site, binding: str, span: Span) -> StreamFold:
    """What `fold` of a norm changes. Raises GraftError, G436, naming the op and its place, where it cannot."""
    return _Claim(analysis, site, binding, span).made()


class _Claim:
    def __init__(self, analysis: Analysis, site: Site, binding: str, span: Span) -> None:
        self.analysis, self.site, self.binding, self.span = analysis, site, binding, span
        self.writers: dict[str, int] = {}
        self.maps: set[int] = set()
        """Ops that may use the weights that change."""

    def made(self) -> StreamFold:
        site, program = self.site, self.analysis.program
        tail = affine_tail(program.module(site.path))
        calls = self.analysis.flat.calls_by_path[site.path]
        call = calls[0]
        if site.facts.get("kind") != "layer_norm" or tail is None:
            self._refuse(f"{site.path} is no LayerNorm with a scale and a shift of its own", [])
        if len(calls) > 1:
            self._refuse(f"{site.path} runs {len(calls)} times", [])
        stream, result = call.args[site.stream], call.result
        if not isinstance(result, Op) or result.target is not _LAYER_NORM:
            self._refuse(f"the norm of {site.path} is written out in single ops", [])
        added = next((u for u in result.users if u.target is ATEN.add.Tensor), None)
        if added is not None:
            self._refuse(f"post-norm: {_shown(added)} adds to what the norm makes", [added])
        self._follow(stream)
        readers = self._readers(result)
        names = [*self.writers, *(n for w, b, _ in readers for n in (w, b) if n is not None)]
        self._check_ties(program, names)
        scale, shift = (None if n is None else f"{site.path}.{n}" for n in tail)
        return StreamFold(tuple(self.writers.items()), tuple(readers), scale, shift)

    # -- the stream ----------------------------------------------------------------------------

    def _follow(self, start: Op) -> None:
        outputs = {o.index for o in self.analysis.flat.outputs}
        seen: set[int] = set()
        stack = [start]
        other_readers: list[tuple[str, Op]] = []  # told last: what writes the stream says more
        while stack:
            op = stack.pop()
            if op.index in seen:
                continue
            seen.add(op.index)
            stack += self._made_of(op)
            if op.index in outputs:
                other_readers.append(("the stream is an output of the model", op))
            for user in op.users:
                if user.target in _SIZES:
                    continue
                if user.target is ATEN.add.Tensor or user.target in _MOVES or _is_cat(user):
                    stack.append(user)
                    if op.kind == "param":
                        self.maps.add(user.index)
                elif user.target is not _LAYER_NORM or user.args[0] is not op:
                    other_readers.append((f"{_shown(user)} reads the stream with its mean", user))
        if other_readers:
            why, op = min(other_readers, key=lambda r: r[1].index)
            self._refuse(why, [op])

    def _made_of(self, op: Op) -> list[Op]:
        """The values of the stream that `op` is made of; a writer has none."""
        target = op.target
        if op.kind == "param":
            self._write(op, -1)
        elif target is ATEN.add.Tensor:
            both = [a for a in op.args[:2] if isinstance(a, Op)]
            if len(both) != 2 or op.kwargs:
                self._refuse(f"{_shown(op)} adds a number to the stream", [op])
            return both
        elif target in _MOVES and isinstance(op.args[0], Op):
            return [op.args[0]]
        elif _is_cat(op):
            return list(op.args[0])
        elif target is ATEN.linear.default:
            self._map(op, op.args[1], 0, op.argument(2, "bias"))
        elif target is ATEN.addmm.default:
            self._map(op, op.args[2], 1, op.args[0])
        elif target is ATEN.embedding.default:
            self._map(op, op.args[0], 1, None)
        elif target in CONVS:
            self._map(op, op.args[1], 0, op.argument(2, "bias"))
        elif target in NORMS:
            self._refuse(f"post-norm: {_shown(op)} writes the stream", [op])
        elif target in (ATEN.mul.Tensor, ATEN.div.Tensor):
            self._refuse(f"a gate stands after the writer: {_shown(op)}", [op])
        else:
            self._refuse(f"{_shown(op)} writes the stream and is no linear map", [op])
        return []

    def _map(self, op: Op, weight: Any, axis: int, bias: Any) -> None:
        self.maps.add(op.index)
        self._write(weight, axis)
        if bias is not None:
            self._write(bias, -1)

    def _write(self, parameter: Any, axis: int) -> None:
        if not isinstance(parameter, Op) or parameter.kind != "param":
            self._refuse(
                "a weight that writes the stream is computed, and no parameter", [parameter]
            )
        width = self.site.facts.get("dim")
        shape = [size_hint(s) for s in parameter.tensor.shape]
        if shape[axis] != width:
            self._refuse(
                f"`{parameter.fqn}` does not write whole tokens of width {width}", [parameter]
            )
        self.writers.setdefault(parameter.fqn, axis)

    # -- who reads the norm --------------------------------------------------------------------

    def _readers(self, result: Op) -> list[tuple[str, str | None, bool]]:
        found: dict[str, tuple[str, str | None, bool]] = {}
        stack = [result]
        while stack:
            op = stack.pop()
            if any(o is op for o in self.analysis.flat.outputs):
                self._refuse(f"the output of {self.site.path} is one of the model", [op])
            for user in op.users:
                if user.target in _SIZES:
                    continue
                if user.target in _MOVES:
                    stack.append(user)
                    continue
                transposed = user.target is ATEN.addmm.default
                at = 1 if transposed else 0
                if user.target not in LINEARS or user.args[at] is not op:
                    self._refuse(f"{_shown(user)} reads the norm and is no linear", [user])
                weight = user.args[2 if transposed else 1]
                bias = user.args[0] if transposed else user.argument(2, "bias")
                if not all(
                    isinstance(p, Op) and p.kind == "param" for p in (weight, bias) if p is not None
                ):
                    self._refuse(f"a weight of {_shown(user)} is computed", [user])
                self.maps.add(user.index)
                found[weight.fqn] = (weight.fqn, None if bias is None else bias.fqn, transposed)
        return list(found.values())

    def _check_ties(self, program: Program, names: Iterable[str]) -> None:
        """A weight that changes is read by nothing but the maps of this claim, under whatever name."""
        changed = {id(tensor_of(program, n)): n for n in names}
        for op in self.analysis.flat.ops:
            if op.kind != "param":
                continue
            name = changed.get(id(tensor_of(program, op.fqn)))
            if name is None:
                continue
            for user in op.users:
                if user.index not in self.maps and user.target not in _SIZES:
                    self._refuse(f"`{name}` is tied: {_shown(user)} reads it too", [user])

    def _refuse(self, why: str, ops: list[Any]) -> NoReturn:
        places = [str(o.node.meta.get("stack_trace") or "") for o in ops if isinstance(o, Op)]
        lines = [p.strip().splitlines()[-1].strip() for p in places if p.strip()]
        fail(
            "G436",
            f"`fold({self.binding})` cannot be made at {self.site.path}: {why}",
            span=self.span,
            site=self.site.path,
            wanted="a pre-norm stream that linears, embeddings and parameters write, and LayerNorms read",
            notes=[Note(line) for line in lines],
        )


def _is_cat(op: Op) -> bool:
    """Tokens after tokens, not features after features."""
    if op.target is not ATEN.cat.default or op.tensor is None:
        return False
    dim = op.argument(1, "dim", 0)
    return isinstance(dim, int) and dim % op.tensor.ndim != op.tensor.ndim - 1


def _shown(op: Op) -> str:
    name = (
        str(op.target).removeprefix("aten.").partition(".")[0]
        if op.kind == "op"
        else op.fqn or op.kind
    )
    return f"`{name}` in {op.path or 'the model'}"
