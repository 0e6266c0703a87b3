"""`operator` and `test` items: what the text alone can tell of them."""

from __future__ import annotations

from collections.abc import Iterable

from graftc.diagnostics import Diagnostic, Instead, fail, nearest
from graftc.language import syntax as s
from graftc.language.resolve_match import read_names
from graftc.language.scope import Log, already, listed

_TYPES = ("tokens", "tensor", "float", "f32", "f64", "bf16", "f16", "i64", "int", "bool", "image")


def check_operator(item: s.OperatorItem, log: Log) -> None:
    """Names are bound once and before they are read, and a value is returned."""
    known: dict[str, s.Name] = {}
    for name in (*(p.name for p in item.parameters), *(t.name for t in item.inputs)):
        if name.text in known:
            message = f"`{name.text}` is bound twice"
            log.add(
                already("G113", message, name.span, known[name.text].span, "give it another name")
            )
        known.setdefault(name.text, name)
    for kind in (*(t.type for t in item.inputs), *item.results):
        with log.attempt():
            _check_type(kind)
    _check_statements(item.statements, {*known, *_dims(item)}, log)
    returned = [x for x in item.statements if isinstance(x, s.Returns)]
    if not returned:
        log.add(
            Diagnostic(
                "G012",
                f"operator `{item.name.text}` returns nothing",
                span=item.name.span,
                wanted="`return value` as its last line",
                help="add `return y`",
            )
        )
    elif returned[0] is not item.statements[-1]:
        after = item.statements[item.statements.index(returned[0]) + 1]
        log.add(
            already("G128", "this is never reached", after.span, returned[0].span, "return last")
        )
    elif len(returned[0].values) != len(item.results):
        log.add(
            Diagnostic(
                "G120",
                f"operator `{item.name.text}` returns {len(returned[0].values)} values",
                span=returned[0].span,
                wanted=f"{len(item.results)}, as its head says",
                found=str(len(returned[0].values)),
            )
        )


def _dims(item: s.OperatorItem) -> set[str]:
    """The symbolic sizes of the inputs (`n` of `tokens[n, dim]`)."""
    found: set[str] = set()
    for typed in item.inputs:
        for size in typed.type.shape.items if typed.type.shape else ():
            if isinstance(size, s.DimProduct):
                found |= {n.text for n in size.names}
            elif not isinstance(size, s.Spread):
                found |= {n.text for n in read_names(size)}
    return found


def _check_type(kind: s.Type) -> None:
    if kind.name.text not in _TYPES:
        near = nearest(kind.name.text, _TYPES)
        fail(
            "G121",
            f"unknown type `{kind.name.text}`",
            span=kind.name.span,
            wanted=listed(_TYPES),
            help=Instead(near) if near else None,
        )


_WORDS = frozenset({"true", "false", "identity", "zero", "random", "site"})


def _check_statements(statements: Iterable[s.Statement], known: set[str], log: Log) -> None:
    """Every value is bound before it is read; options' words (`name = in_proj`) are not values."""
    for statement in statements:
        values = statement.values if isinstance(statement, s.Returns) else (statement.value,)
        for name in (n for v in values for n in _values(v)):
            if name.text not in known and name.text not in _WORDS:
                near = nearest(name.text, known)
                with log.attempt():
                    fail(
                        "G105",
                        f"`{name.text}` is not bound",
                        span=name.span,
                        wanted="an input, a parameter or a value computed above",
                        help=Instead(near) if near else None,
                    )
        if isinstance(statement, s.Assign):
            known |= {t.text for t in statement.targets}


def _values(node: s.Expr) -> list[s.Name]:
    """The values that an expression reads, but for named options: `kernel` may be a word there."""
    if isinstance(node, s.Call):
        inner = [a for a in node.arguments if not isinstance(a, (s.Named, s.Spread))]
        return [n for a in inner for n in _values(a)]
    if isinstance(node, s.Binary) and node.op in ("==", "!="):
        return _values(node.left)  # `feature == relu`: a word
    if isinstance(node, s.Binary):
        return [*_values(node.left), *_values(node.right)]
    if isinstance(node, s.Unary):
        return _values(node.operand)
    return read_names(node)


def check_test(item: s.TestItem, log: Log) -> None:
    """A test has a graph to start from, and each of its clauses once."""
    seen: dict[str, s.TestClause] = {}
    for clause in item.clauses:
        if clause.word in seen:
            message = f"`{clause.word}` stands twice in test `{item.name.text}`"
            log.add(already("G011", message, clause.span, seen[clause.word].span, "write it once"))
        seen.setdefault(clause.word, clause)
    if "before" not in seen:
        log.add(
            Diagnostic(
                "G012",
                f"test `{item.name.text}` has no `before`",
                span=item.name.span,
                wanted="before { … }, the graph that the rule is tried on",
            )
        )
    if "after" not in seen and "expect" not in seen:
        log.add(
            Diagnostic(
                "G012",
                f"test `{item.name.text}` tests nothing",
                span=item.name.span,
                wanted="after { … } or expect N",
            )
        )
