"""Files: the one that is checked, and those that it uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from graftc.diagnostics import Diagnostic, GraftError, Note, Source, Span, fail, nearest
from graftc.language import syntax as s
from graftc.language.parser import parse
from graftc.language.resources import rules_folder

_MOST_FILES = 100
_DEEPEST_PATH = 8
_LONGEST_PATH = 200


def read(path: Path, span: Span | None = None) -> Source:
    """The text of a file. Raises GraftError, at `span` where a `use` names the file."""
    site = None if span else str(path)
    if path.is_dir():
        fail(
            "G001",
            f"`{path}` is a folder",
            span=span,
            site=site,
            wanted="a `.graft` file",
            help=_in_folder(path),
        )
    try:
        return Source.read(path)
    except FileNotFoundError:
        _missing(path, span)
    except UnicodeDecodeError as error:
        raw = path.read_bytes()
        line = raw.count(b"\n", 0, error.start) + 1
        fail(
            "G008",
            f"`{path.name}` is not UTF-8",
            span=span,
            site=f"{path}:{line}",
            found=f"byte 0x{raw[error.start]:02x} at offset {error.start}",
            help="save it as UTF-8",
        )
    except OSError as error:
        fail(
            "G001",
            f"`{path}` cannot be read",
            span=span,
            site=site,
            found=error.strerror or str(error),
        )


def _in_folder(path: Path) -> str | None:
    found = sorted(path.glob("*.graft"))[:1]
    return f"name one of its files, such as `{found[0]}`" if found else None


def _missing(path: Path, span: Span | None) -> NoReturn:
    near: str | None = None
    if path.parent.is_dir():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.graft")])
    raise GraftError(
        Diagnostic(
            "G140" if span else "G001",
            f"there is no file `{path}`",
            span=span,
            site=None if span else str(path),
            wanted="a `.graft` file" if near is None else None,
            help=f"a near name is `{path.with_name(near)}`" if near else None,
        )
    )


@dataclass
class Loader:
    """Finds and parses used files, each once; remembers every text it read."""

    sources: dict[Path, Source] = field(default_factory=dict[Path, Source])
    documents: dict[Path, s.Document] = field(default_factory=dict[Path, s.Document])

    def used(
        self, use: s.Use, folder: Path, chain: tuple[Path, ...]
    ) -> tuple[Path, s.Document, str | None]:
        """The file that a `use` names, and the one rule that its path names, if it does.

        `use std.mixers.hyena` is rule `hyena` of `std/mixers.graft` where no file has that name.
        """
        rule: str | None = None
        if isinstance(use.module, s.Path):
            path, rule = _shipped(use.module)
        else:
            path = _beside(use.module, folder)
        if path in chain:
            cycle = " → ".join(p.name for p in (*chain[chain.index(path) :], path))
            fail(
                "G142",
                f"`{path.name}` uses itself: {cycle}",
                span=use.module.span,
                help="move what both need to a third file",
            )
        if path not in self.documents:
            if len(self.documents) >= _MOST_FILES:
                fail("G142", f"more than {_MOST_FILES} files are used", span=use.module.span)
            source = read(path, use.module.span)
            self.sources[path] = source
            try:
                self.documents[path] = parse(source)
            except GraftError as error:
                note = Note("it is used here", use.span)
                with_note = (_with_note(d, note) for d in error.diagnostics)
                raise GraftError(*with_note) from None
        return path, self.documents[path], rule


def _with_note(diagnostic: Diagnostic, note: Note) -> Diagnostic:
    return replace(diagnostic, notes=(*diagnostic.notes, note))


def _shipped(module: s.Path) -> tuple[Path, str | None]:
    root = rules_folder().resolve()
    names = [n.text for n in module.names]
    path = root.joinpath(*names[:_DEEPEST_PATH]).with_suffix(".graft")
    if len(names) <= _DEEPEST_PATH and len(module.text) < _LONGEST_PATH and path.is_file():
        return path, None
    parent = root.joinpath(*names[:-1]).with_suffix(".graft") if len(names) > 1 else root
    if 2 < len(names) <= _DEEPEST_PATH and len(module.text) < _LONGEST_PATH and parent.is_file():
        return parent, names[-1]
    known = shipped_modules()
    near = nearest(module.text, known)
    fail(
        "G143",
        f"no rules `{module.text[:60]}` ship with graftc",
        span=module.span,
        wanted=", ".join(f"`{k}`" for k in known),
        found=f"`{module.text}`",
        help=f"write `use {near}`" if near else 'for a file of your own write `use "file.graft"`',
    )


def shipped_modules() -> list[str]:
    """What `use` can name without quotes.

    >>> "std.mixers" in shipped_modules()
    True
    """
    root = rules_folder().resolve()
    return sorted(
        ".".join(p.relative_to(root).with_suffix("").parts) for p in root.rglob("*.graft")
    )


def _beside(module: s.Text, folder: Path) -> Path:
    text = module.value
    inside = 'a path inside the folder of this file, such as "parts/mixers.graft"'
    if not text.strip() or len(text) > _LONGEST_PATH or "\0" in text or "\\" in text:
        fail(
            "G140",
            "this is no path",
            span=module.span,
            wanted=inside,
            found=f'"{text}"',
            help="write `/` between folders" if "\\" in text else None,
        )
    base = folder.resolve()
    path = (folder / text).resolve()
    if Path(text).is_absolute() or not path.is_relative_to(base):
        fail(
            "G141",
            "`use` must not leave the folder of its file",
            span=module.span,
            wanted=inside,
            found=str(path),
            help="copy the file into the folder",
        )
    if (
        not path.exists()
        and not text.endswith(".graft")
        and path.with_name(path.name + ".graft").exists()
    ):
        fail(
            "G140",
            f"there is no file `{path}`",
            span=module.span,
            help=f'write `use "{text}.graft"`',
        )
    return path
