"""Expressions: parameters put in, facts checked against roles, types checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NoReturn

from graftc.diagnostics import Instead, Note, fail, nearest
from graftc.language import syntax as s
from graftc.language.evaluate import evaluate, shown
from graftc.language.resolve_guards import kind_fact, shape_alone
from graftc.language.rules import Expr, Fact, Literal_, Operation
from graftc.language.scope import Scope, Setting, listed, suggest
from graftc.language.vocabulary import BLOCK_PARTS, FACTS, FUNCTIONS, KINDS, FactWord, Type, may_be
from graftc.operators.spec import Value

Wanted = Literal["int", "float", "bool", "symbol", "text", "any"]
_IN_WORDS: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "`true` or `false`",
    "symbol": "a word",
    "text": 'a "quoted" text',
}
_COMPARISONS = ("<", "<=", ">", ">=")
_DEEPEST_SETTING = 8


def expression(scope: Scope, node: s.Expr) -> tuple[Expr, Type]:
    """A resolved expression and its type. Raises GraftError."""
    match node:
        case s.Number(value=value, span=span):
            return Literal_(value, span), "int" if isinstance(value, int) else "float"
        case s.Percent(value=value, span=span):
            return Literal_(value, span), "float"
        case s.Text(value=value, span=span):
            return Literal_(value, span), "text"
        case s.Name():
            return _word(scope, node, 0)
        case s.Path(names=(name,)):
            return _word(scope, name, 0)
        case s.Path():
            fail(
                "G120",
                f"`{node.text}` is a source of weights, not a value",
                span=node.span,
                wanted="a number, a word or a fact such as `dim(a)`",
                help=f"use it in `init`, or write a fact of `{node.names[0].text}`",
            )
        case s.Unary():
            return _unary(scope, node)
        case s.Binary():
            return _binary(scope, node)
        case s.Call():
            return _call(scope, node)
        case s.IsKind():
            return kind_fact(scope, node), "bool"
        case s.HasShape():
            shape_alone(scope, node)
        case s.Maybe() | s.Alternatives():
            fail(
                "G120",
                "this is a dataflow pattern, not a value",
                span=node.span,
                help="use it in `match { … }`",
            )
        case s.Braces() | s.ListOf():
            fail("G120", "a list is not a value here", span=node.span, wanted="one number or word")


def _word(scope: Scope, name: s.Name, depth: int) -> tuple[Expr, Type]:
    text = name.text
    if text in ("true", "false"):
        return Literal_(text == "true", name.span), "bool"
    setting = scope.setting(text)
    if setting is not None:
        return _of_setting(scope, setting, name, depth)
    if text in scope.bindings:
        scope.bindings[text].used = True
        if not scope.bindings[text].site:  # a number that a pattern captures, or a size
            return Fact("value", text, {}, name.span), "float"
        fail(
            "G120",
            f"`{text}` is a site, not a value",
            span=name.span,
            wanted="a number, a word or a fact of the site",
            help=f"write a fact, such as `dim({text})`",
        )
    return Literal_(text, name.span), "symbol"


def _of_setting(scope: Scope, setting: Setting, name: s.Name, depth: int) -> tuple[Expr, Type]:
    if depth > _DEEPEST_SETTING:
        fail(
            "G116",
            f"`set {setting.name}` is defined by itself",
            span=setting.span,
            help="give it a value",
        )
    value, span = setting.value, name.span
    match value:
        case (
            s.Number(value=number)
            | s.BlockRange(first=s.Number(value=number), last=None, step=None)
        ):
            return Literal_(number, span), "int" if isinstance(number, int) else "float"
        case s.Percent(value=fraction):
            return Literal_(fraction, span), "float"
        case s.Text(value=text):
            return Literal_(text, span), "text"
        case s.BlockRange(first=s.Name() as other, last=None, step=None):
            return _word(scope, s.Name(other.text, span), depth + 1)
        case s.BlockWord(word=word):
            return Literal_(word, span), "symbol"
        case _:
            fail(
                "G120",
                f"parameter `{setting.name}` is a block set, not a value",
                span=span,
                found=value.span.text,
                notes=[Note("it is set here", setting.span)],
            )


def _unary(scope: Scope, node: s.Unary) -> tuple[Expr, Type]:
    if node.op == "not":
        return Operation("not", (condition(scope, node.operand),), node.span), "bool"
    inner, kind = _number(scope, node.operand)
    if isinstance(inner, Literal_) and isinstance(inner.value, (int, float)):
        return Literal_(-inner.value, node.span), kind
    return Operation("neg", (inner,), node.span), kind


def _binary(scope: Scope, node: s.Binary) -> tuple[Expr, Type]:
    op, span = node.op, node.span
    if op in ("and", "or"):
        parts = (condition(scope, node.left), condition(scope, node.right))
        return Operation(op, _flat(op, parts), span), "bool"
    if op in ("==", "!="):
        return _equality(scope, node), "bool"
    left, left_type = _number(scope, node.left)
    right, right_type = _number(scope, node.right)
    if op in _COMPARISONS:
        return Operation(op, (left, right), span), "bool"
    kind: Type = "int" if left_type == right_type == "int" else "float"
    return Operation(op, (left, right), span), kind


def _flat(op: str, parts: tuple[Expr, Expr]) -> tuple[Expr, ...]:
    first = parts[0]
    if isinstance(first, Operation) and first.op == op:
        return (*first.args, parts[1])
    return parts


def _number(scope: Scope, node: s.Expr) -> tuple[Expr, Type]:
    resolved, kind = expression(scope, node)
    if kind not in ("int", "float"):
        _not_a(scope, node, resolved, kind, "a number")
    return resolved, kind


def condition(scope: Scope, node: s.Expr) -> Expr:
    """A resolved expression that is true or false. Raises GraftError."""
    resolved, kind = expression(scope, node)
    if kind != "bool":
        _not_a(scope, node, resolved, kind, "a condition")
    return resolved


def _not_a(scope: Scope, node: s.Expr, resolved: Expr, kind: Type, wanted: str) -> NoReturn:
    help: str | Instead | None = None
    if kind == "symbol" and isinstance(resolved, Literal_):
        word = str(resolved.value)
        if word in FACTS and scope.bindings:
            help = Instead(f"{word}({next(iter(scope.bindings))})")
        else:
            near = nearest(word, (*scope.settings, *FACTS))
            help = Instead(near) if near else f"add `set {word} = …`"
    elif wanted == "a condition":
        sign = ">=" if kind in ("int", "float") else "=="
        help = f"compare it: `{shown(resolved)} {sign} …`"
    fail(
        "G120",
        f"`{node.span.text}` is not {wanted}",
        span=node.span,
        wanted=wanted,
        found=_IN_WORDS[kind],
        help=help,
    )


def _equality(scope: Scope, node: s.Binary) -> Expr:
    left, left_type = expression(scope, node.left)
    right, right_type = expression(scope, node.right)
    numeric = {"int", "float"}
    if left_type != right_type and not {left_type, right_type} <= numeric:
        texts = [x for x in (left, right) if isinstance(x, Literal_)]
        quoted = {left_type, right_type} == {"symbol", "text"} and texts
        fail(
            "G120",
            f"`{node.left.span.text}` and `{node.right.span.text}` are never equal",
            span=node.span,
            wanted=f"{_IN_WORDS[left_type]} on both sides",
            found=_IN_WORDS[right_type],
            help=f"leave out the quotes: `{texts[0].value}`" if quoted else None,
        )
    if isinstance(left, Fact) and isinstance(right, Fact):
        _check_two(scope, node, left, right)
    for fact, word in ((left, right), (right, left)):
        if isinstance(fact, Fact) and isinstance(word, Literal_):
            _check_choice(scope, fact, word)
    return Operation(node.op, (left, right), node.span)


def _choices(scope: Scope, fact: Fact) -> tuple[str, ...]:
    """The words that a fact can be; nothing where it is no word, or where the site's role is not known."""
    if fact.name not in FACTS:  # a number that a pattern captures
        return ()
    binding, _, part = fact.binding.partition(".")
    role = part or scope.bindings[binding].role
    return KINDS.get(role, ()) if fact.name == "kind" and role else FACTS[fact.name].choices


def _check_two(scope: Scope, node: s.Binary, left: Fact, right: Fact) -> None:
    one, other = _choices(scope, left), _choices(scope, right)
    if one and other and not set(one) & set(other):
        fail(
            "G120",
            f"`{shown(left)}` and `{shown(right)}` are never equal",
            span=node.span,
            wanted=listed(one),
            found=listed(other),
        )


def _check_choice(scope: Scope, fact: Fact, word: Literal_) -> None:
    choices = _choices(scope, fact)
    if choices and word.value not in choices:
        fail(
            "G121",
            f"{shown(fact)} is never `{word.value}`",
            span=word.span,
            wanted=listed(choices),
            found=f"`{word.value}`",
            help=suggest(str(word.value), choices),
        )


def _call(scope: Scope, node: s.Call) -> tuple[Expr, Type]:
    if isinstance(node.head, s.Alternatives):
        fail("G120", "this is a dataflow pattern, not a value", span=node.span)
    name = node.head.text
    if name in FUNCTIONS:
        if node.named or len(node.positional) < 2:
            fail(
                "G126",
                f"`{name}` takes two or more values",
                span=node.span,
                help=f"write `{name}(x, y)`",
            )
        parts = [_number(scope, a) for a in node.positional]
        kind: Type = "int" if all(k == "int" for _, k in parts) else "float"
        return Operation(name, tuple(p for p, _ in parts), node.span), kind
    word = FACTS.get(name)
    if word is None:
        if name == "shape":
            fail(
                "G379",
                "a shape is no number",
                span=node.span,
                wanted="shape(x) ~ [b, n, d]",
                help="name its sizes, and compare these",
            )
        known = (*FACTS, *FUNCTIONS)
        fail(
            "G104",
            f"unknown predicate `{name}`",
            span=node.head.span,
            wanted=listed(known, 30),
            found=f"`{name}`",
            help=suggest(name, known),
        )
    return _fact(scope, node, name, word), word.type


def _site_role(site: s.Path, role: str | None) -> str | None:
    """The role of `a`, or of the one site `b.attention` inside a block. Raises GraftError where it can be none."""
    first, *inner = site.names
    if not inner:
        return role
    part = inner[0]
    if part.text not in BLOCK_PARTS or role not in (None, "block") or len(inner) > 1:
        known = part.text in BLOCK_PARTS
        wrong = inner[-1] if known else part
        fail(
            "G109",
            f"`{first.text}` has no site `{'.'.join(n.text for n in inner)}` inside",
            span=wrong.span,
            wanted=listed(BLOCK_PARTS) + " of a block",
            found=f"`{wrong.text}`",
            help=None if known else suggest(part.text, BLOCK_PARTS),
        )
    return part.text


def _fact(scope: Scope, node: s.Call, name: str, word: FactWord) -> Fact:
    arguments = node.positional
    if len(arguments) != 1:
        fail(
            "G126",
            f"`{name}` takes one site",
            span=node.span,
            wanted=f"{name}(a)",
            found=f"{len(arguments)} values",
        )
    site = arguments[0]
    if not isinstance(site, s.Path):
        fail("G120", f"`{name}` takes a site", span=site.span, wanted="a name that `match` binds")
    binding = scope.binding(site.names[0])
    role = _site_role(site, binding.role)
    if word.roles and role and not _ever(role, word.roles):
        has = [n for n, f in FACTS.items() if not f.roles or _ever(role, f.roles)]
        fail(
            "G125",
            f"`{name}` is no fact of {_a(role)}",
            span=node.span,
            wanted=listed(tuple(has), 30),
            found=f"`{name}`",
            notes=[Note(f"`{binding.name}` is bound to {role} here", binding.span)],
            help=suggest(name, tuple(has)),
        )
    return Fact(name, site.text, fact_options(scope, node, name), node.span)


def fact_options(scope: Scope, node: s.Expr, name: str) -> dict[str, Value]:
    """The options of a predicate, or of a measure of a block set. Raises GraftError where one is missing or wrong."""
    word = FACTS[name]
    found = options_of(scope, node, word.options or {}) if isinstance(node, s.Call) else {}
    for required in word.required:
        if required not in found:
            site = "a, " if isinstance(node, s.Call) and node.positional else ""
            fail(
                "G123",
                f"`{name}` needs `{required}`",
                span=node.span,
                wanted=f"{required} = …",
                found=node.span.text,
                help=f"write `{name}({site}{required} = 32)`",
            )
    band = found.get("band")
    if isinstance(band, int) and band < 0:
        fail("G122", f"`{name}` takes a band from 0 up", span=node.span,
             wanted="0 or more", found=str(band))  # fmt: skip
    return found


def _ever(role: str, roles: tuple[str, ...]) -> bool:
    return any(may_be(role, r) for r in roles)


def _a(role: str) -> str:
    return ("an " if role[0] in "aeiou" else "a ") + role


def options_of(scope: Scope, node: s.Call, kinds: Mapping[str, Type]) -> dict[str, Value]:
    """The constant named arguments of a predicate."""
    found: dict[str, Value] = {}
    for argument in node.named:
        name = argument.name
        if name.text not in kinds:
            fail(
                "G103",
                f"`{node.span.text.split('(')[0]}` has no option `{name.text}`",
                span=name.span,
                wanted=listed(tuple(kinds)) or "no options",
                help=suggest(name.text, tuple(kinds)) or f"leave out `{name.text}`",
            )
        found[name.text] = constant(scope, argument.value, kinds[name.text])
    return found


def typed(scope: Scope, node: s.Expr, wanted: Wanted) -> Expr:
    """An expression of a wanted type, folded to a literal where no fact is in it."""
    resolved, kind = expression(scope, node)
    fits = wanted in ("any", kind) or (wanted == "float" and kind == "int")
    if not fits:
        _wrong_kind(scope, node, resolved, kind, wanted)
    return folded(resolved)


def folded(expr: Expr) -> Expr:
    """A literal where the expression holds no fact."""
    if isinstance(expr, Literal_) or has_fact(expr):
        return expr
    return Literal_(evaluate(expr, _no_fact), expr.span)


def has_fact(expr: Expr) -> bool:
    """Whether a site's facts are in it."""
    return isinstance(expr, Fact) or (isinstance(expr, Operation) and any(map(has_fact, expr.args)))


def _no_fact(fact: Fact) -> Value:
    raise AssertionError(fact.name)


def _wrong_kind(scope: Scope, node: s.Expr, resolved: Expr, kind: Type, wanted: str) -> NoReturn:
    help: str | Instead | None = None
    if kind == "symbol" and isinstance(resolved, Literal_):
        others = [k for k in scope.settings if k != node.span.text]
        near = nearest(str(resolved.value), (*others, "true", "false"))
        help = Instead(near) if near else None
    elif wanted == "int" and isinstance(resolved, Literal_) and isinstance(resolved.value, float):
        help = Instead(str(round(resolved.value)))
    elif wanted == "symbol" and kind == "text":
        help = f"leave out the quotes: `{getattr(resolved, 'value', '')}`"
    fail(
        "G120",
        f"`{node.span.text}` is not {_IN_WORDS[wanted]}",
        span=node.span,
        wanted=_IN_WORDS[wanted],
        found=_IN_WORDS[kind]
        if kind != "symbol"
        else f"the word `{getattr(resolved, 'value', '')}`",
        notes=origin(scope, node),
        help=help,
    )


def origin(scope: Scope, node: s.Expr) -> tuple[Note, ...]:
    """A note of where a parameter got the value that is wrong here."""
    name = node.names[0] if isinstance(node, s.Path) else node
    setting = scope.settings.get(name.text) if isinstance(name, s.Name) else None
    if setting is None:
        return ()
    return (Note(f"parameter `{setting.name}` is {setting.value.span.text}", setting.value.span),)


def constant(scope: Scope, node: s.Expr, wanted: Wanted) -> Value:
    """The value of an expression that no model is needed for. Raises GraftError."""
    resolved = typed(scope, node, wanted)
    if not isinstance(resolved, Literal_):
        fail(
            "G120",
            "this must not depend on the model",
            span=node.span,
            wanted="a number or a word",
            found=shown(resolved),
        )
    return resolved.value


def whole(scope: Scope, node: s.Expr, what: str, least: int) -> int:
    """A constant integer of at least `least`. Raises GraftError."""
    value = constant(scope, node, "int")
    assert isinstance(value, int)
    if value < least:
        fail(
            "G122",
            f"{what} must be at least {least}",
            span=node.span,
            wanted=f"{least} or more",
            found=str(value),
            notes=origin(scope, node),
            help=f"write `{least}`",
        )
    return value
