"""The TextMate grammar of `.graft`, made from grammar/graft.lark's keywords and the language's words.

VS Code and other editors that read TextMate grammars colour with it. Such a grammar knows no syntax, so a
word that is spelt like a keyword is coloured as one where it is followed by no `=`, `,`, `.` or `)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graftc.editor.keywords import group, keywords
from graftc.language.vocabulary import FACTS, LOSSES, POLICIES, ROLES
from graftc.operators.specs import MERGES, SPECS

_SCOPES = {
    "item": "keyword.declaration.graft",
    "clause": "keyword.control.clause.graft",
    "operator": "keyword.operator.word.graft",
    "modifier": "keyword.other.modifier.graft",
}
_NOT_A_NAME = r"(?!\s*=(?!=)|\s*[,.)])"
_OPENING = r"(?![\w.])"


def grammar() -> dict[str, Any]:
    """The grammar as JSON-ready data.

    >>> grammar()["scopeName"]
    'source.graft'
    """
    return {
        "$schema": "https://raw.githubusercontent.com/martinring/tmlanguage/master/tmlanguage.json",
        "name": "Graft",
        "scopeName": "source.graft",
        "fileTypes": ["graft"],
        "patterns": [{"include": f"#{name}"} for name in _REPOSITORY],
        "repository": {name: {"patterns": patterns} for name, patterns in _REPOSITORY.items()},
    }


def _match(scope: str, pattern: str) -> dict[str, Any]:
    return {"name": scope, "match": pattern}


def _words(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=lambda w: (-len(w), w))) + ")"


def _defined(word: str, scope: str) -> dict[str, Any]:
    """`rule hyena`: the keyword, and the name that it brings."""
    return {
        "match": rf"^\s*({word})\s+([A-Za-z_]\w*)",
        "captures": {
            "1": {"name": _SCOPES["item"]},
            "2": {"name": scope},
        },
    }


_RULE_HEAD = {
    # `repeat(` is a keyword only here; elsewhere it is a source of weights or an op
    "match": r"^\s*(rule)\s+([A-Za-z_]\w*)(?:\s+(exact|approx|learned))?(?:\s+(repeat)(?=\s*\())?",
    "captures": {
        "1": {"name": _SCOPES["item"]},
        "2": {"name": "entity.name.type.rule.graft"},
        "3": {"name": _SCOPES["modifier"]},
        "4": {"name": _SCOPES["modifier"]},
    },
}

_MATCH_PYTHON = {
    # elsewhere `python(` is an operator
    "match": r"(?<![\w.])(match)\s+(python)(?=\s*\()",
    "captures": {"1": {"name": _SCOPES["clause"]}, "2": {"name": _SCOPES["modifier"]}},
}


def _keyword_patterns() -> list[dict[str, Any]]:
    grouped: dict[str, list[str]] = {}
    for word in keywords():
        grouped.setdefault(group(word), []).append(word)
    patterns = [
        _RULE_HEAD,
        _MATCH_PYTHON,
        _defined("operator", "entity.name.function.operator.graft"),
        _defined("test", "entity.name.type.test.graft"),
        _defined("set", "variable.other.parameter.graft"),
        # `in blocks blocks`: the second is a parameter
        _match("variable.other.graft", rf"(?<=\bblocks )blocks{_OPENING}"),
    ]
    for kind, scope in _SCOPES.items():
        # `and`, `or` stand before anything; the rest may be names, as in `train = lora(…)`
        tail = _OPENING if kind == "operator" else _OPENING + _NOT_A_NAME
        words = rf"(?!(?:repeat|python)\s*\(){_words(grouped[kind])}"
        patterns.append(_match(scope, rf"(?<![\w.]){words}{tail}"))
    return patterns


def _name_patterns() -> list[dict[str, Any]]:
    operators = {*SPECS, *MERGES, "parallel", "copy", "lora", "python"}
    plain = {*ROLES, *LOSSES} - {*operators}
    return [
        _match("support.function.operator.graft", rf"(?<![\w.]){_words(operators)}(?=\s*\()"),
        _match("support.type.role.graft", rf"(?<![\w.]){_words(plain | {'mlp', 'linear'})}{_OPENING}(?!\s*=)"),
        _match("support.function.fact.graft", rf"(?<![\w.]){_words(FACTS)}(?=\s*\()"),
        _match("support.function.source.graft", rf"(?<![\w.]){_words(POLICIES)}{_OPENING}(?!\s*=)"),
        _match("constant.language.graft", rf"(?<![\w.])(?:true|false){_OPENING}"),
        _match("variable.parameter.graft", r"(?<![\w.])[A-Za-z_]\w*(?=\s*=(?!=))"),
        _match("variable.other.graft", r"[A-Za-z_]\w*"),
    ]  # fmt: skip


_REPOSITORY: Mapping[str, list[dict[str, Any]]] = {
    "comment": [_match("comment.line.number-sign.graft", r"#.*$")],
    "string": [
        {
            "name": "string.quoted.double.graft",
            "begin": '"',
            "end": r'"|$',
            "patterns": [_match("constant.character.escape.graft", r'\\[\\"]')],
        }
    ],
    "number": [
        _match("constant.numeric.percent.graft", r"(?<!\w)[0-9]+(?:\.[0-9]+)?%(?![\w(])"),
        _match("constant.numeric.graft", r"(?<!\w)[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?[kM]?(?!\w)"),
    ],
    "keyword": _keyword_patterns(),
    "name": _name_patterns(),
    "sign": [
        _match("keyword.operator.graft", r"->|\.\.\.|…|\.\.|==|!=|<=|>=|[<>=+\-*/%~|]"),
        _match("punctuation.graft", r"[,.:(){}\[\]]"),
    ],
}  # fmt: skip
