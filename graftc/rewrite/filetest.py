"""`graftc test`: the tests of a rule file, each a rule on a small graph that the file writes out.

`before` becomes a Program by the same capture as a model; the rule's matches are counted, rewritten, and what is
there then is captured again and compared with `after`, line by line. Where the rule says `exact`, its ops are run
before and after on random inputs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.diagnostics import Diagnostic, GraftError, Note, Span, fail
from graftc.language.rules import Binds, GraphTest, SiteTerm
from graftc.language.terms import read_names
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.flat import Op, flatten
from graftc.program.model import Model
from graftc.program.program import Program
from graftc.rewrite.apply import apply
from graftc.rewrite.claims import check_claims
from graftc.rewrite.dataflow.lower import Lowering
from graftc.rewrite.dataflow.own_side import own_side
from graftc.rewrite.dataflow.proof import TOLERANCE, proof_text, prove
from graftc.rewrite.dataflow.view import program_view
from graftc.rewrite.edits import Edit, edits_of
from graftc.rewrite.exact import difference
from graftc.rewrite.match import Matches, find_matches
from graftc.rewrite.repeat import round_texts, run_repeated


@dataclass(frozen=True)
class TestResult:
    """One test: what went wrong (nothing: it passed), and what was found true on the way."""

    file: str
    name: str
    rule: str
    matches: int | None
    checks: tuple[str, ...]
    problems: tuple[Diagnostic, ...]
    __test__ = False

    @property
    def passed(self) -> bool:
        return not self.problems


def run_test(test: GraphTest, file: str = "") -> TestResult:
    """Runs one test; what fails in it is in the result, never raised.

    >>> from graftc.language.check import check
    >>> text = '''
    ... rule to_silu exact { match { y = x * sigmoid(x) }
    ...   rewrite { y = silu(x) } }
    ... test gate of to_silu { before { y = x * sigmoid(x) }
    ...   inputs x: tensor[2, 8]
    ...   after { y = silu(x) }
    ...   expect 1 }'''
    >>> result = run_test(check(text).tests[0])
    >>> result.passed, result.matches
    (True, 1)
    """
    run = _Run(test)
    try:
        run.all()
    except GraftError as error:
        run.problems += [_in_test(d, test) for d in error.diagnostics]
    return TestResult(
        file, test.name, test.rule.name, run.matches, tuple(run.checks), tuple(run.problems)
    )


def _nothing_new(edits: Sequence[Edit], analysis: Analysis, made: Program) -> None:
    """A rule on ops gives its new parameters their values itself."""
    assert not any(e.new for e in edits)


def _in_test(diagnostic: Diagnostic, test: GraphTest) -> Diagnostic:
    note = Note(f"in test `{test.name}`", test.span)
    return replace(diagnostic, notes=(*diagnostic.notes, note))


@dataclass
class _Run:
    test: GraphTest
    matches: int | None = None
    checks: list[str] = field(default_factory=list[str])
    problems: list[Diagnostic] = field(default_factory=list[Diagnostic])

    def all(self) -> None:
        test, rule = self.test, self.test.rule
        for told in own_side(rule):
            if told.severity == "error":
                self.problems.append(_in_test(told, test))
            else:
                self.checks.append(f"{told.severity}[{told.code}]: {told.message} ({told.span})")
        if self.problems:
            return
        model = _model(_graph(test, test.before, _weights(test)), test)
        analysis = analyse(capture(model))
        found = find_matches(rule, analysis, program_view(analysis.flat))
        student, edits = analysis.program, []
        self.matches = len(found.found)
        if found.found and rule.repeat is not None:
            student, rounds = run_repeated(
                [replace(rule, expect=None)], analysis.program, fill=_nothing_new
            )
            self.matches = sum(len(r.edits) for r in rounds)
            self.checks += round_texts(rounds)
        elif found.found:
            taken = {p for p, _ in student.root.named_modules(remove_duplicate=False)}
            edits = edits_of(rule, found.found, analysis, taken)
            check_claims([e.claim for e in edits])
            student, _ = apply(analysis.program, edits)
        self._count(found)
        if test.after is not None:
            self._structure(test.after, student)
        if rule.contract == "exact" and found.found:
            proofs = [prove(rule, e.ops, analysis.program) for e in edits if e.ops is not None]
            self.checks += [proof_text(rule, proofs)] if proofs else []
            self._numbers(analysis.program, student, model)
        elif found.found:
            self.checks.append(f"numbers NOT RUN: rule `{rule.name}` does not say exact")

    def _count(self, found: Matches) -> None:
        expect, count = self.test.expect, self.matches
        if expect is None:
            if not count:
                self._fails(
                    "G474", "the rule matches nothing", self.test.span, "a match", "none", found
                )
            return
        if count != expect:
            self._fails(
                "G474",
                "the rule does not match as often",
                self.test.expect_span or self.test.span,
                _times(expect),
                _times(count or 0),
                found,
            )
        else:
            self.checks.append(_times(expect))

    def _fails(
        self, code: str, message: str, span: Span, wanted: str, found: str, matches: Matches
    ) -> None:
        notes = [Note(f"near miss at {f.path}: {f.reason}") for f in matches.filtered[:6]]
        diagnostic = Diagnostic(
            code,
            f"test `{self.test.name}`: {message}",
            span,
            wanted=wanted,
            found=found,
            notes=(*notes, Note(f"rule `{self.test.rule.name}` is here", self.test.rule.span)),
        )
        self.problems.append(diagnostic)

    def _structure(self, after: tuple[Binds, ...], student: Program) -> None:
        """The graph that the rule made, against `after`: both captured, so both written alike."""
        test = self.test
        weights = {**_weights(test), **_new_weights(test, student, after)}
        wanted = _text(_model(_graph(test, after, weights), test))
        found = _text(_model(student.root, test))
        if wanted == found:
            self.checks.append(f"the graph is as in `after`, {_ops(len(wanted) - 1)}")
            return
        at = next(
            (i for i, (w, f) in enumerate(zip(wanted, found, strict=False)) if w != f),
            min(len(wanted), len(found)),
        )
        self.problems.append(
            Diagnostic(
                "G475",
                f"test `{test.name}`: the rule makes another graph than `after`",
                test.after_span or test.span,
                wanted=_line(wanted, at),
                found=_line(found, at),
                notes=(
                    Note("the whole graph is: " + "; ".join(found)),
                    Note(f"rule `{test.rule.name}` is here", test.rule.span),
                ),
            )
        )

    def _numbers(self, before: Program, after: Program, model: Model) -> None:
        outputs = [o.tensor for o in flatten(before).outputs]
        if not any(t is not None and t.is_floating_point() for t in outputs):
            self.checks.append("the graph's outputs: NOT RUN (none is a floating-point tensor)")
            return
        if difference(before, before, model.inputs)[0] != 0:
            self.checks.append("the graph's outputs: NOT RUN (two runs of `before` differ)")
            return
        error, dtype = difference(before, after, model.inputs)
        limit = TOLERANCE.get(dtype, 1e-5)
        name = str(dtype).removeprefix("torch.")
        if not error <= limit:
            self.problems.append(
                Diagnostic(
                    "G476",
                    f"test `{self.test.name}`: the numbers change, and rule `{self.test.rule.name}` says exact",
                    self.test.span,
                    wanted=f"a relative difference of at most {limit:g} in {name}",
                    found=f"{error:.3g}",
                    notes=(Note("the rule is here", self.test.rule.span),),
                    help="leave out `exact`, or correct the rewrite",
                )
            )
            return
        self.checks.append(
            f"the graph's outputs: relative difference {error:.2g} in {name} (limit {limit:g})"
        )


def _times(count: int) -> str:
    return f"{count} match{'es' * (count != 1)}"


def _ops(count: int) -> str:
    return f"{count} op{'s' * (count != 1)}"


def _line(lines: Sequence[str], at: int) -> str:
    return lines[at] if at < len(lines) else "the end of the graph"


# -- from lines to a graph ---------------------------------------------------------------------


def _weights(test: GraphTest) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        i.name: torch.randn(i.shape, generator=generator) for i in test.inputs if i.kind == "weight"
    }


def _examples(test: GraphTest) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        i.name: torch.randn(i.shape, generator=generator) for i in test.inputs if i.kind == "tensor"
    }


def _model(module: nn.Module, test: GraphTest) -> Model:
    examples = _examples(test)
    if not examples:
        fail(
            "G471",
            f"test `{test.name}` has no input that varies",
            span=test.span,
            wanted="inputs x: tensor[2, 8]",
        )
    # Every size is what the test says: no dimension is taken for a batch.
    return Model(module.eval(), examples, dynamic={name: {} for name in examples})


def _graph(
    test: GraphTest, lines: tuple[Binds, ...], weights: Mapping[str, Tensor]
) -> fx.GraphModule:
    """A module of the lines. Raises GraftError (G473) at the op that does not take its values."""
    root = nn.Module()
    graph = fx.Graph()
    names: dict[str, Any] = dict(test.numbers)
    for name, example in _examples(test).items():
        names[name] = graph.placeholder(name)
        names[name].meta["val"] = example
    for name, weight in weights.items():
        root.register_parameter(name, nn.Parameter(weight))
        names[name] = graph.get_attr(name)
        names[name].meta["val"] = weight

    def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], span: Span) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            with torch.no_grad():
                node.meta["val"] = target(*values, **named)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = [str(list(v.shape)) for v in _tensors_in((values, named))]
            fail(
                "G473",
                f"`{span.text}` does not take these values: {str(error).splitlines()[0][:200]}",
                span=span,
                found=", ".join(shapes) or None,
            )
        return node

    def no_site(term: SiteTerm, args: Any) -> Any:
        raise AssertionError(term.binding)  # the names of a test are values

    lowering = Lowering(emit, names, lambda v: isinstance(v, fx.Node), no_site)
    for line in lines:
        made = lowering.term(line.value)
        items = _parts(made, line, emit)
        for target, item in zip(line.targets, items, strict=True):
            if not isinstance(item, fx.Node) and target.name in test.outputs:
                fail("G473", f"`{target.name}` is a number, no tensor", span=target.span)
            names[target.name] = item
    graph.output(tuple(names[n] for n in test.outputs))
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph)


def _parts(made: Any, line: Binds, emit: Any) -> tuple[Any, ...]:
    if len(line.targets) == 1:
        return (made,)
    values = made.meta["val"] if isinstance(made, fx.Node) else None
    size = len(values) if isinstance(values, (tuple, list)) else 1  # pyright: ignore[reportUnknownArgumentType]
    if size != len(line.targets):
        fail("G473", f"{len(line.targets)} names for {size} values", span=line.span,
             wanted=f"{size} names")  # fmt: skip
    return tuple(emit(operator.getitem, (made, i), {}, line.span) for i in range(size))


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors_in(v)]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors_in(v)]  # pyright: ignore[reportUnknownVariableType]
    return []


def _new_weights(test: GraphTest, student: Program, after: tuple[Binds, ...]) -> dict[str, Tensor]:
    """The parameters that `after` reads and the rule made, under the rule's names."""
    given = {i.name for i in test.inputs} | set(test.numbers)
    found: dict[str, Tensor] = {}
    for name, parameter in student.root.named_parameters():
        plain = _plain(name)
        if plain != name and plain not in given:
            found.setdefault(plain, parameter.detach())
    made = {t.name for line in after for t in line.targets}
    for line in after:
        for name in read_names(line.value):
            if name not in {*given, *made, *found}:
                fail(
                    "G477",
                    f"`after` reads `{name}`, which the rule did not make here",
                    span=line.span,
                    wanted=", ".join(f"`{n}`" for n in (*found, *given)),
                )
    return found


_NEW = re.compile(r"_graft\d+$")


def _plain(name: str) -> str:
    return _NEW.sub("", name)


# -- a graph as text ---------------------------------------------------------------------------


def _text(model: Model) -> tuple[str, ...]:
    """The ops of a model in the order that its outputs need them, values numbered, weights by name."""
    flat = flatten(capture(model))
    names: dict[Op, str] = {}
    lines: list[str] = []

    def shown(value: Any) -> str:
        if isinstance(value, Op):
            return name_of(value)
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(shown(v) for v in value) + "]"  # pyright: ignore[reportUnknownVariableType]
        return str(value)

    def name_of(op: Op) -> str:
        if op not in names:
            if op.kind == "input":
                names[op] = str(op.target)
            elif op.kind == "param":
                names[op] = _plain(op.fqn)
            else:
                given = [shown(a) for a in op.args]
                given += [f"{k}={shown(v)}" for k, v in sorted(op.kwargs.items())]
                target = getattr(op.target, "__name__", str(op.target)).removesuffix(".default")
                name = f"v{len(lines)}"
                lines.append(f"{name} = {target}({', '.join(given)})")
                names[op] = name
        return names[op]

    returned = [name_of(o) for o in flat.outputs]
    return (*lines, "return " + ", ".join(returned))
