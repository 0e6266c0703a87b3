"""`set` parameters: a file's own, overridden by who uses it and by `--set`."""

from __future__ import annotations

from collections.abc import Mapping

from graftc.diagnostics import Diagnostic, Source, nearest
from graftc.language import syntax as s
from graftc.language.parser import parse_set_value
from graftc.language.scope import Log, Setting, already, listed


def given(overrides: Mapping[str, str], log: Log) -> dict[str, Setting]:
    """The `--set` values. Mistakes go to the log."""
    found: dict[str, Setting] = {}
    for name, text in overrides.items():
        source = Source(f"--set {name}", text)
        with log.attempt():
            value = parse_set_value(source)
            found[name] = Setting(name, value, value.span)
    return found


def settings_of(
    document: s.Document, inherited: Mapping[str, Setting], log: Log
) -> dict[str, Setting]:
    """A file's parameters; where `inherited` has a value of the name, it wins."""
    found: dict[str, Setting] = {}
    for item in document.items:
        if not isinstance(item, s.SetItem):
            continue
        name = item.name.text
        if name in found:
            message, first = f"parameter `{name}` is set twice", found[name].span
            log.add(
                already("G116", message, item.name.span, first, "set it once; `--set` overrides it")
            )
            continue
        if name in ("true", "false"):
            log.add(
                Diagnostic(
                    "G116",
                    f"`{name}` cannot be a parameter",
                    span=item.name.span,
                    help="give it another name",
                )
            )
        value = inherited[name].value if name in inherited else item.value
        found[name] = Setting(name, value, item.name.span)
    return found


def check_parameters(
    own: Mapping[str, Setting],
    used_files: Mapping[str, Setting],
    overrides: Mapping[str, Setting],
    log: Log,
) -> None:
    """A parameter that nothing reads is a misspelling: of its name, or of its use."""
    for name, setting in own.items():
        if setting.used:
            continue
        near = nearest(name, [n for n in used_files if n not in own])
        log.add(
            Diagnostic(
                "G117",
                f"parameter `{name}` is never used",
                span=setting.span,
                help=f"write `set {near} = …`, a parameter of a file that is used"
                if near
                else "leave it out",
            )
        )
    known = {**used_files, **own}
    for name, setting in overrides.items():
        if name in known:
            if not setting.used and name not in own:
                log.add(
                    Diagnostic(
                        "G117",
                        f"`--set {name}` has no effect: no rule that is used reads it",
                        span=setting.span,
                        help="leave it out",
                    )
                )
            continue
        near = nearest(name, known)
        log.add(
            Diagnostic(
                "G106",
                f"`--set {name}`: there is no such parameter",
                span=setting.span,
                wanted=f"one of {listed(known)}" if known else "a file with `set` parameters",
                found=f"`{name}`",
                help=f"write `--set {near}={setting.value.span.text}`" if near else None,
            )
        )
