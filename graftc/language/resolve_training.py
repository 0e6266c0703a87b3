"""`distill`, `finetune`, `train` and `drop`: words with kinds and ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftc.diagnostics import Note, fail
from graftc.language import syntax as s
from graftc.language.expressions import constant, origin, typed, whole
from graftc.language.rules import Distill, Finetune, Literal_, Lora
from graftc.language.scope import Scope, already, listed, suggest
from graftc.language.vocabulary import DISTILL, DROPS, FINETUNE, LOSSES, TRAIN_WORDS, OptionWord
from graftc.operators.spec import OperatorSpec

_EXCLUSIVE = (("samples", "data"), ("steps", "epochs"))
_DISTILL_GROUPS = ("all", "inserted")


def distill_of(scope: Scope, clause: s.DistillClause, spec: OperatorSpec | None) -> Distill | None:
    """Stage 1 of a rule; `spec` is the new operator's, for the groups that `train` can name.

    Mistakes go to the scope's log.
    """
    words = [o for o in clause.options if o.value is None]
    loss = "l2"
    with scope.log.attempt():
        if not words:
            fail(
                "G123",
                "`distill` needs its loss",
                span=clause.span,
                wanted=listed(LOSSES),
                help="write `distill l2, …`",
            )
        loss = _loss(words)
    values = _options(scope, clause.options, DISTILL, "distill")
    if "delta" in values and loss not in ("huber", "auto"):
        with scope.log.attempt():
            fail(
                "G127",
                "`delta` is for the loss `huber`",
                span=clause.span,
                found=f"`{loss}`",
                help="write `distill huber, …`, or leave out `delta`",
            )
    for option in clause.options:
        if option.name.text == "train" and spec is not None and "train" in values:
            with scope.log.attempt():
                _check_group(option, str(values["train"]), spec)
    return Distill(loss, clause.span, **values)


def _loss(words: Sequence[s.Option]) -> Any:
    name = words[0].name
    if name.text not in LOSSES:
        takes = (*LOSSES, *DISTILL)
        fail(
            "G121",
            f"unknown loss `{name.text}`",
            span=name.span,
            wanted=listed(LOSSES),
            found=f"`{name.text}`",
            help=f"write `{name.text} = …`" if name.text in DISTILL else suggest(name.text, takes),
        )
    if len(words) > 1:
        second = words[1].name
        value = second.text in DISTILL
        fail(
            "G119" if second.text in LOSSES else "G123",
            "one loss at a time" if second.text in LOSSES else f"`{second.text}` needs a value",
            span=second.span,
            notes=[Note("the loss is here", name.span)],
            help=f"write `{second.text} = …`" if value else suggest(second.text, tuple(DISTILL)),
        )
    return name.text


def _check_group(option: s.Option, group: str, spec: OperatorSpec) -> None:
    known = (*spec.groups, *_DISTILL_GROUPS)
    if group not in known:
        fail(
            "G121",
            f"`{spec.name}` has no group of parameters `{group}`",
            span=option.span,
            wanted=listed(known),
            found=f"`{group}`",
            help=suggest(group, known),
        )


def finetune_of(scope: Scope, item: s.FinetuneItem) -> Finetune:
    """Stage 2. Mistakes go to the scope's log."""
    for option in item.options:
        if option.value is None:
            with scope.log.attempt():
                name = option.name
                fail(
                    "G123",
                    f"`{name.text}` needs a value",
                    span=name.span,
                    wanted=f"{name.text} = …",
                    help=suggest(name.text, tuple(FINETUNE)),
                )
    values = _options(scope, item.options, FINETUNE, "finetune")
    warmup, steps = values.get("warmup"), values.get("steps")
    if isinstance(warmup, int) and isinstance(steps, int) and warmup > steps:
        with scope.log.attempt():
            at = next(o for o in item.options if o.name.text == "warmup")
            fail(
                "G122",
                "the warm-up is longer than the training",
                span=at.span,
                wanted=f"at most {steps} steps",
                found=str(warmup),
            )
    with scope.log.attempt():
        _check_terms(item, values)
    return Finetune(item.span, **values)


def _check_terms(item: s.FinetuneItem, values: Mapping[str, Any]) -> None:
    """A precision that there is, and a loss that is not nothing."""
    precision = values.get("precision")
    if precision not in (None, "float32", "bfloat16"):
        at = next(o for o in item.options if o.name.text == "precision")
        fail(
            "G121",
            f"`precision` cannot be `{precision}`",
            span=at.span,
            wanted="`float32` or `bfloat16`",
            help={"bf16": "write `bfloat16`", "fp32": "write `float32`"}.get(str(precision))
            or suggest(str(precision), ("float32", "bfloat16")),
        )
    if values.get("task") == 0 and not (values.get("teacher") or values.get("features")):
        at = next(o for o in item.options if o.name.text == "task")
        fail(
            "G122",
            "the loss of stage 2 has no term left",
            span=at.span,
            wanted="`task`, `teacher` or `features` above 0",
            help="write `teacher = 1`",
        )


def _options(
    scope: Scope, options: Sequence[s.Option], words: Mapping[str, OptionWord], clause: str
) -> dict[str, Any]:
    """Field of Distill or Finetune → value."""
    found: dict[str, Any] = {}
    seen: dict[str, s.Option] = {}
    for option in options:
        if option.value is None:
            continue
        name = option.name.text
        with scope.log.attempt():
            word = words.get(name)
            if word is None:
                fail(
                    "G110",
                    f"`{clause}` has no option `{name}`",
                    span=option.name.span,
                    wanted=listed(words, 30),
                    found=f"`{name}`",
                    help=suggest(name, words),
                )
            if name in seen:
                first = seen[name].span
                message = f"`{name}` is given twice"
                scope.log.add(already("G119", message, option.span, first, "give it once"))
                continue
            seen[name] = option
            found[word.field] = _option(scope, name, word, option.value)
    for one, other in _EXCLUSIVE:
        if one in seen and other in seen:
            late = max(seen[one], seen[other], key=lambda o: o.span.start)
            early = min(seen[one], seen[other], key=lambda o: o.span.start)
            message = f"`{one}` and `{other}` say the same thing twice"
            scope.log.add(already("G127", message, late.span, early.span, "leave one out"))
    return found


def _option(scope: Scope, name: str, word: OptionWord, node: s.Expr) -> Any:
    if word.kind == "percent":
        value = constant(scope, node, "float")
        assert isinstance(value, (int, float))
        _in_range(scope, name, value, word, node)
        return float(value)
    if word.kind == "counts":
        return _counts(scope, name, node)
    if word.kind == "train":
        return _train(scope, node)
    if word.kind == "inputs":
        return _inputs(scope, node)
    if word.kind == "bool":
        return constant(scope, node, "bool")
    if word.kind == "word":
        return constant(scope, node, "symbol")
    value = constant(scope, node, "int" if word.kind == "int" else "float")
    assert isinstance(value, (int, float))
    _in_range(scope, name, value, word, node)
    return value if word.kind == "int" else float(value)


def _in_range(scope: Scope, name: str, value: float, word: OptionWord, node: s.Expr) -> None:
    low_ok = value > word.low if word.above else value >= word.low
    if low_ok and value <= word.high:
        return
    help: str | None = None
    if word.kind == "percent":
        wanted = "a share of DATA, such as 10%: more than 0% and at most 100%"
        help = (
            f"write `{name} = {value:g}%`"
            if 1 < value <= 100
            else f"for a number, write `samples = {value:g}`"
        )
    else:
        low = f"more than {word.low:g}" if word.above else f"{word.low:g} or more"
        wanted = low if word.high >= 1e12 else f"{low}, at most {word.high:g}"
    fail(
        "G122",
        f"`{name}` is out of range",
        span=node.span,
        wanted=wanted,
        found=node.span.text,
        notes=origin(scope, node),
        help=help,
    )


def _counts(scope: Scope, name: str, node: s.Expr) -> tuple[int, ...]:
    if isinstance(node, s.Path) and len(node.names) == 1:
        setting = scope.setting(node.text)
        if setting is not None and isinstance(setting.value, s.Braces):
            node = setting.value
    items = node.items if isinstance(node, s.Braces) else (node,)
    found: list[int] = []
    for item in items:
        if isinstance(item, (s.RangeItem, s.Pair)):
            fail("G120", f"`{name}` takes numbers of steps", span=item.span, wanted="{75k, 150k}")
        found.append(whole(scope, item, f"a step of `{name}`", 1))
        if len(found) > 1 and found[-1] <= found[-2]:
            fail(
                "G122",
                f"the steps of `{name}` rise",
                span=item.span,
                wanted=f"more than {found[-2]}",
                found=str(found[-1]),
            )
    if not found:
        fail("G123", f"`{name}` names no step", span=node.span, wanted="{75k, 150k}")
    return tuple(found)


def _inputs(scope: Scope, node: s.Expr) -> tuple[float, float]:
    """`teacher`, `student`, or `mix(first, last)`: shares of the student's own inputs."""
    if isinstance(node, s.Call) and isinstance(node.head, s.Path) and node.head.text == "mix":
        shares: list[float] = []
        for given in (*node.positional, *(a.value for a in node.named)):
            value = constant(scope, given, "float")
            assert isinstance(value, (int, float))
            if not 0 <= value <= 1:
                fail(
                    "G122",
                    "a share of `mix` is out of range",
                    span=given.span,
                    wanted="a share from 0% to 100%",
                    found=given.span.text,
                )
            shares.append(float(value))
        if len(shares) != 2 or node.named:
            fail(
                "G123",
                "`mix` takes the share of the student's inputs at the first step and at the last",
                span=node.span,
                wanted="mix(0%, 100%)",
                found=node.span.text,
            )
        return shares[0], shares[1]
    words = {"teacher": (0.0, 0.0), "student": (1.0, 1.0)}
    chosen = str(constant(scope, node, "symbol"))
    if chosen not in words:
        fail(
            "G121",
            f"`inputs` cannot be `{chosen}`",
            span=node.span,
            wanted="`teacher`, `student` or `mix(0%, 100%)`",
            help=suggest(chosen, ("teacher", "student", "mix")),
        )
    return words[chosen]


def _train(scope: Scope, node: s.Expr) -> Any:
    if isinstance(node, s.Call) and isinstance(node.head, s.Path):
        if node.head.text != "lora":
            fail(
                "G121",
                f"`train` cannot be `{node.head.text}(…)`",
                span=node.span,
                wanted="`all`, `inserted` or `lora(rank = …)`",
                help=suggest(node.head.text, ("lora",)),
            )
        return _lora(scope, node)
    chosen = typed(scope, node, "symbol")
    value = chosen.value if isinstance(chosen, Literal_) else None
    if value not in ("all", "inserted"):
        fail(
            "G121",
            f"`train` cannot be `{value}`",
            span=node.span,
            wanted="`all`, `inserted` or `lora(rank = …)`",
            help="write `lora(rank = 16)`"
            if value == "lora"
            else suggest(str(value), ("all", "inserted")),
        )
    return value


def _lora(scope: Scope, node: s.Call) -> Lora:
    rank: int | None = None
    alpha: float | None = None
    if node.positional:
        fail(
            "G126",
            "`lora` takes its arguments by name",
            span=node.positional[0].span,
            wanted="`rank`, `alpha`",
            help=f"write `rank = {node.positional[0].span.text}`",
        )
    for argument in node.named:
        name = argument.name.text
        if name == "rank":
            rank = whole(scope, argument.value, "`rank`", 1)
        elif name == "alpha":
            value = constant(scope, argument.value, "float")
            assert isinstance(value, (int, float))
            if value <= 0:
                fail("G122", "`alpha` is more than 0", span=argument.value.span, found=str(value))
            alpha = float(value)
        else:
            fail(
                "G103",
                f"`lora` has no argument `{name}`",
                span=argument.name.span,
                wanted="`rank`, `alpha`",
                help=suggest(name, ("rank", "alpha")),
            )
    if rank is None:
        fail(
            "G123",
            "`lora` needs `rank`",
            span=node.span,
            wanted="lora(rank = 16)",
            help="write `lora(rank = 16)`",
        )
    return Lora(rank, alpha)


def drops_of(scope: Scope, clauses: Sequence[s.WordsClause]) -> tuple[str, ...]:
    """What a rule gives up. Mistakes go to the scope's log."""
    found: list[str] = []
    for name in (n for c in clauses for n in c.names):
        with scope.log.attempt():
            if name.text == "causal":
                fail(
                    "G112",
                    "causality is set, not dropped",
                    span=name.span,
                    help="write `causal = false` in the operator's arguments",
                )
            if name.text not in DROPS:
                fail(
                    "G112",
                    f"nothing is called `{name.text}` that a site can drop",
                    span=name.span,
                    wanted=listed(DROPS),
                    help=suggest(name.text, DROPS),
                )
            if name.text in found:
                fail("G119", f"`{name.text}` is dropped twice", span=name.span, help="say it once")
            found.append(name.text)
    return tuple(found)


def trains_inserted(scope: Scope, clauses: Sequence[s.WordsClause]) -> bool:
    """Whether the rule says `train inserted`. Mistakes go to the scope's log."""
    for name in (n for c in clauses for n in c.names):
        with scope.log.attempt():
            if name.text not in TRAIN_WORDS:
                fail(
                    "G112",
                    f"a rule cannot train `{name.text}`",
                    span=name.span,
                    wanted=listed(TRAIN_WORDS),
                    help=suggest(name.text, TRAIN_WORDS) or "write `train inserted`",
                )
    return bool(clauses)
