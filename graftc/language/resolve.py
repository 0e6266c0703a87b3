"""Document → Rules: names, parameters and used files put in, every mistake reported at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftc.diagnostics import Diagnostic, GraftError, Note, Span, fail
from graftc.language import syntax as s
from graftc.language.conflicts import conflicts
from graftc.language.contradictions import contradictions
from graftc.language.load import Loader
from graftc.language.parameters import check_parameters, given, settings_of
from graftc.language.resolve_operator import check_operator, check_test
from graftc.language.resolve_rule import rule_of
from graftc.language.resolve_tests import check_test_names, test_of
from graftc.language.resolve_training import finetune_of
from graftc.language.rule_names import check_after, check_rule_names, check_used_names, unknown_rule
from graftc.language.rules import Finetune, GraphTest, Rule, Rules
from graftc.language.scope import DefinedOperator, Log, Scope, Setting, already
from graftc.language.written_spec import spec_of
from graftc.operators.spec import OperatorSpec

_DEEPEST_USE = 20
_MOST_ERRORS = 50


def resolve(
    document: s.Document,
    overrides: Mapping[str, str] | None = None,
    *,
    operators: Mapping[str, OperatorSpec] | None = None,
    merges: Mapping[str, OperatorSpec] | None = None,
    folder: Path | None = None,
    earlier: Sequence[Diagnostic] = (),
) -> Rules:
    """What a document means. Raises GraftError with every mistake, in the order of the text.

    `overrides` are the `--set` values, as text. `operators` and `merges` are the specs that rules
    can name (by default all that ship); `folder` is where `use "…"` looks (by default the folder
    of the document's file). `earlier` are mistakes of syntax, to be reported along: the document
    then holds only what could be parsed, and what may be missing from it is no mistake.

    >>> from graftc.diagnostics import Source
    >>> from graftc.language.parser import parse
    >>> text = "set n = 2\\nrule r { \\n match b = block in blocks first n\\n skip b\\n}"
    >>> rules = resolve(parse(Source("a.graft", text)), {"n": "4"})
    >>> rules.rules[0].matches[0].blocks.count, rules.parameters["n"]
    (4, '4')
    """
    from graftc.operators.specs import MERGES, SPECS

    log = Log(list(earlier))
    state = _State(
        SPECS if operators is None else operators, MERGES if merges is None else merges, log
    )
    path = Path(document.source.name)
    base = folder or (path.parent if path.suffix == ".graft" else Path.cwd())
    set_values = given(overrides or {}, log)
    partial = bool(earlier)
    module = state.module(document, base, set_values, path.resolve(), (), None)
    if not partial:
        check_rule_names([r.item for r in module.rules], log)
        check_after([r.item for r in module.rules], log)
        check_parameters(module.settings, state.settings, set_values, log)
        _check_empty(document, module, log)
    for name, item in module.tests:
        rules = {r.item.name.text for r in module.rules}
        if not partial and name.text not in rules:
            unknown_rule(name, rules, "a rule of this file", log)
        check_test(item, log)
    tests = (
        ()
        if log.errors
        else _tests(module, Scope(state.operators, state.merges, log, module.settings))
    )
    errors = log.errors
    if errors:
        found = dict.fromkeys(e for e in errors if e not in earlier)
        raise GraftError(*_first(*earlier, *sorted(found, key=_place)))
    resolved = tuple(r.rule for r in module.rules if r.rule is not None)
    said = [d for r in resolved for d in contradictions(r)] + list(conflicts(resolved))
    if any(d.severity == "error" for d in said):
        raise GraftError(*_first(*sorted((d for d in said if d.severity == "error"), key=_place)))
    sources = (document.source, *state.loader.sources.values())
    return Rules(
        rules=resolved,
        finetune=module.finetune,
        parameters={
            n: x.value.span.text for n, x in (*state.settings.items(), *module.settings.items())
        },
        files=tuple(x.name for x in sources),
        digest=hashlib.sha256(
            "\0".join(x.text for x in sources).encode("utf-8", "replace")
        ).hexdigest(),
        notes=(*(d for d in log.diagnostics if d.severity != "error"), *said),
        tests=tests,
    )


def _tests(module: _Module, scope: Scope) -> tuple[GraphTest, ...]:
    rules = {r.item.name.text: r.rule for r in module.rules}
    check_test_names([item for _, item in module.tests], scope.log)
    found: list[GraphTest] = []
    for name, item in module.tests:
        rule = rules[name.text]
        with scope.log.attempt():
            if rule is not None:
                found.append(test_of(scope, item, rule))
    return tuple(found)


def _place(diagnostic: Diagnostic) -> tuple[str, int]:
    span = diagnostic.span
    return (span.source.name, span.start) if span else ("", 0)


def _first(*diagnostics: Diagnostic) -> tuple[Diagnostic, ...]:
    """As many as somebody reads; the last says how many more there are."""
    shown, more = diagnostics[:_MOST_ERRORS], len(diagnostics) - _MOST_ERRORS
    if more <= 0:
        return shown
    last = replace(shown[-1], notes=(*shown[-1].notes, Note(f"and {more} more mistakes")))
    return (*shown[:-1], last)


@dataclass(frozen=True)
class _Ruled:
    """A rule as written and as resolved (None: it has mistakes)."""

    item: s.RuleItem
    rule: Rule | None


@dataclass
class _Module:
    """A file, resolved: its own rules after those that it uses."""

    rules: list[_Ruled] = field(default_factory=list[_Ruled])
    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    tests: list[tuple[s.Name, s.TestItem]] = field(default_factory=list[tuple[s.Name, s.TestItem]])
    defined: dict[str, DefinedOperator] = field(default_factory=dict[str, DefinedOperator])
    finetune: Finetune | None = None


@dataclass
class _State:
    """One resolution: what does not change from file to file, and what was seen."""

    operators: Mapping[str, OperatorSpec]
    merges: Mapping[str, OperatorSpec]
    log: Log
    loader: Loader = field(default_factory=Loader)
    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    seen: set[tuple[Path, int]] = field(default_factory=set[tuple[Path, int]])

    def module(
        self,
        document: s.Document,
        folder: Path,
        inherited: Mapping[str, Setting],
        path: Path,
        users: tuple[Path, ...],
        only: frozenset[str] | None,
    ) -> _Module:
        """The file's rules (those in `only`), its parameters overridden by `inherited`."""
        log, module = self.log, _Module()
        own = settings_of(document, inherited, log)
        module.settings = own
        for use in (i for i in document.items if isinstance(i, s.Use)):
            with log.attempt():
                self._use(use, module, folder, {**inherited, **own}, (*users, path))
        _define(document, module, log)
        scope = Scope(self.operators, self.merges, log, own, module.defined)
        for item in document.items:
            if isinstance(item, s.RuleItem) and (only is None or item.name.text in only):
                if (path, item.span.start) in self.seen:
                    continue  # the same file, used by two others
                self.seen.add((path, item.span.start))
                module.rules.append(_Ruled(item, rule_of(scope, item)))
            elif isinstance(item, s.TestItem) and not users:
                module.tests.append((item.rule, item))
        _finetune(document, module, scope)
        for name, setting in own.items():
            if setting.used and name in inherited:
                inherited[name].used = True
        return module

    def _use(
        self,
        use: s.Use,
        module: _Module,
        folder: Path,
        settings: Mapping[str, Setting],
        chain: tuple[Path, ...],
    ) -> None:
        if len(chain) > _DEEPEST_USE:
            fail(
                "G142",
                "files use one another too deep",
                span=use.span,
                wanted=f"at most {_DEEPEST_USE}",
            )
        path, document, rule = self.loader.used(use, folder, chain)
        only: frozenset[str] | None = None
        if use.names is not None:
            only = frozenset(n.text for n in use.names)
            check_used_names(use.names, document)
        elif rule is not None:
            only = frozenset({rule})
            assert isinstance(use.module, s.Path)
            check_used_names(use.module.names[-1:], document)
        used = self.module(document, path.parent, settings, path, chain, only)
        module.rules += used.rules
        self.settings |= used.settings
        short = use.module.names[0].text if isinstance(use.module, s.Path) else path.stem
        for name, defined in used.defined.items():
            if "." not in name:
                module.defined[f"{short}.{name}"] = defined
                if name not in self.operators:
                    module.defined.setdefault(name, defined)
            else:
                module.defined.setdefault(name, defined)
        if used.finetune is not None:
            if module.finetune is not None and not any(
                isinstance(i, s.FinetuneItem) for i in document.items
            ):
                return
            module.finetune = module.finetune or used.finetune


def _define(document: s.Document, module: _Module, log: Log) -> None:
    own: dict[str, s.OperatorItem] = {}
    for item in document.items:
        if not isinstance(item, s.OperatorItem):
            continue
        name = item.name.text
        if name in own:
            message = f"operator `{name}` is defined twice"
            log.add(
                already(
                    "G118", message, item.name.span, own[name].name.span, "give it another name"
                )
            )
            continue
        own[name] = item
        before = len(log.errors)
        check_operator(item, log)
        spec: OperatorSpec | None = None
        if len(log.errors) == before:
            with log.attempt():
                spec = spec_of(item, str(item.name.span))
        module.defined[name] = DefinedOperator(item, Path(document.source.name).stem, spec)


def _finetune(document: s.Document, module: _Module, scope: Scope) -> None:
    items = [i for i in document.items if isinstance(i, s.FinetuneItem)]
    for second in items[1:]:
        message = "`finetune` stands twice"
        scope.log.add(already("G011", message, second.span, items[0].span, "write one"))
    for item in items[:1]:
        with scope.log.attempt():
            module.finetune = finetune_of(scope, item)


def _check_empty(document: s.Document, module: _Module, log: Log) -> None:
    whole = any(isinstance(i, (s.RuleItem, s.OperatorItem)) for i in document.items)
    if whole or module.rules or module.defined or log.errors:
        return
    fails = Diagnostic(
        "G009",
        "this file has no rules",
        span=Span(document.source, 0, 1),
        wanted="a rule, or `use` of a file with rules",
        notes=(Note("the least: rule NAME { match a = mlp in blocks odd … }"),)
        if not document.items
        else (),
        help="write a rule: docs/language.md begins with one",
    )
    log.add(fails)
