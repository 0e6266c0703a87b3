"""`graftc lsp`: the language server, over standard input and output.

The only file of this folder that needs pygls (`pip install 'graftc[lsp]'`). Nothing here imports torch:
with `--model`, chains and paths come from `graftc inspect` in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from lsprotocol import types as lsp
from pygls.lsp.server import LanguageServer
from pygls.uris import from_fs_path, to_fs_path
from pygls.workspace import TextDocument

from graftc import __version__
from graftc.diagnostics import Diagnostic, GraftError, Source, Span
from graftc.editor.completion import NOTHING_KNOWN, ItemKind, Known, complete
from graftc.editor.definition import Location, definition
from graftc.editor.describe import hover
from graftc.editor.meaning import meaning_at
from graftc.editor.page import Page
from graftc.language import syntax as s
from graftc.language.check import check
from graftc.language.formatter import format_text

_QUIET_SECONDS = 0.2
"""How long the text must rest before it is checked while somebody types."""

_SEVERITY = {
    "error": lsp.DiagnosticSeverity.Error,
    "warning": lsp.DiagnosticSeverity.Warning,
    "note": lsp.DiagnosticSeverity.Information,
}
_KINDS: dict[ItemKind, lsp.CompletionItemKind] = {
    "keyword": lsp.CompletionItemKind.Keyword,
    "role": lsp.CompletionItemKind.Class,
    "operator": lsp.CompletionItemKind.Function,
    "argument": lsp.CompletionItemKind.Property,
    "value": lsp.CompletionItemKind.EnumMember,
    "name": lsp.CompletionItemKind.Variable,
    "fact": lsp.CompletionItemKind.Function,
    "policy": lsp.CompletionItemKind.Function,
    "option": lsp.CompletionItemKind.Property,
    "slot": lsp.CompletionItemKind.Field,
    "module": lsp.CompletionItemKind.Module,
    "chain": lsp.CompletionItemKind.Struct,
    "path": lsp.CompletionItemKind.File,
    "rule": lsp.CompletionItemKind.Reference,
    "part": lsp.CompletionItemKind.Field,
}


class GraftServer(LanguageServer):
    """The server; `known` is what `--model` told, once it is there."""

    def __init__(self, model: str | None = None) -> None:
        super().__init__("graftc", __version__)
        self.model = model
        self.known: Known = NOTHING_KNOWN
        self.found: dict[str, tuple[int | None, tuple[Diagnostic, ...]]] = {}

    def text(self, uri: str) -> tuple[TextDocument, str, int]:
        """A document, its text without a byte-order mark, and how many characters that took."""
        document = self.workspace.get_text_document(uri)
        bare = document.source.removeprefix("\ufeff")
        return document, bare, len(document.source) - len(bare)

    async def inspect_model(self) -> None:
        """Ask `graftc inspect` for the chains and paths of the model that the command line named."""
        if self.model is None:
            return
        words = (sys.executable, "-m", "graftc", "inspect", self.model, "--format", "json")
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        if process.returncode:
            said = (out + err).decode(errors="replace").strip()[-500:]
            message = f"`graftc inspect {self.model}` failed: {said}"
            self.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Error, message))
            return
        found = json.loads(out)
        chains = {c["name"]: len(c["blocks"]) for c in found["chains"]}
        self.known = Known(chains, tuple(x["path"] for x in found["sites"]))
        names = ", ".join(f"{c} ({n} blocks)" for c, n in chains.items()) or "no chains"
        self.window_log_message(
            lsp.LogMessageParams(lsp.MessageType.Info, f"{self.model}: {names}")
        )

    def diagnosed(self, uri: str, anew: bool = True) -> tuple[Diagnostic, ...]:
        """What is said of a document as it stands; `anew` False: as it was said of this version."""
        document, text, _ = self.text(uri)
        version, known = self.found.get(uri, (None, ()))
        if not anew and version is not None and version == document.version:
            return known
        try:
            found = check(Source(_path(uri), text)).notes
        except GraftError as error:
            found = error.diagnostics
        self.found[uri] = (document.version, found)
        return found

    def publish(self, uri: str) -> None:
        """Check a document as it stands, and tell the editor."""
        document, text, shift = self.text(uri)
        source = Source(_path(uri), text)
        shown = [_diagnostic(d, source, document, shift) for d in self.diagnosed(uri)]
        self.text_document_publish_diagnostics(
            lsp.PublishDiagnosticsParams(uri, shown, document.version)
        )


def _path(uri: str) -> str:
    return to_fs_path(uri) or uri


def _range(document: TextDocument, start: int, end: int) -> lsp.Range:
    at = document.client_position_at_offset
    return lsp.Range(at(start), at(end))


def _file_range(span: Span) -> lsp.Location:
    (line, column), (last, end) = (span.source.position(x) for x in (span.start, span.end))
    where = lsp.Range(lsp.Position(line - 1, column - 1), lsp.Position(last - 1, end - 1))
    return lsp.Location(_uri(span.source.name), where)


def _uri(path: str) -> str:
    return from_fs_path(str(Path(path).absolute())) or path


def _diagnostic(
    d: Diagnostic, source: Source, document: TextDocument, shift: int
) -> lsp.Diagnostic:
    """A mistake in a used file stands at the `use` that leads to it; its place is told along."""
    here = next(
        (x for x in (d.span, *(n.span for n in d.notes)) if x and x.source.name == source.name),
        None,
    )
    start, end = (here.start + shift, max(here.end, here.start + 1) + shift) if here else (0, 0)
    lines = [d.message]
    lines += [f"wanted: {d.wanted}"] if d.wanted else []
    lines += [f"found: {d.found}"] if d.found else []
    lines += [n.message for n in d.notes if n.span is None]
    lines += [f"help: {d.help}"] if d.help else []
    places = [(n.message, n.span) for n in d.notes if n.span is not None]
    if d.span is not None and d.span is not here:
        places.insert(0, (d.message, d.span))
    return lsp.Diagnostic(
        range=_range(document, start, min(end, len(document.source))),
        message="\n".join(lines),
        severity=_SEVERITY[d.severity],
        code=d.code,
        source="graftc",
        related_information=[
            lsp.DiagnosticRelatedInformation(_file_range(span), message) for message, span in places
        ],
    )


def build(model: str | None = None) -> GraftServer:
    """The server with its features; `model` is what `-m` names."""
    server = GraftServer(model)

    @server.feature(lsp.INITIALIZED)
    async def _started(ls: GraftServer, params: lsp.InitializedParams) -> None:  # pyright: ignore[reportUnusedFunction]
        await ls.inspect_model()

    @server.feature(lsp.TEXT_DOCUMENT_DID_OPEN)
    def _opened(ls: GraftServer, params: lsp.DidOpenTextDocumentParams) -> None:  # pyright: ignore[reportUnusedFunction]
        ls.publish(params.text_document.uri)

    @server.feature(lsp.TEXT_DOCUMENT_DID_SAVE)
    def _saved(ls: GraftServer, params: lsp.DidSaveTextDocumentParams) -> None:  # pyright: ignore[reportUnusedFunction]
        for uri in list(ls.workspace.text_documents):  # others may use it
            ls.publish(uri)

    @server.feature(lsp.TEXT_DOCUMENT_DID_CHANGE)
    async def _changed(ls: GraftServer, params: lsp.DidChangeTextDocumentParams) -> None:  # pyright: ignore[reportUnusedFunction]
        await asyncio.sleep(_QUIET_SECONDS)
        uri, version = params.text_document.uri, params.text_document.version
        if uri in ls.workspace.text_documents and ls.text(uri)[0].version == version:
            ls.publish(uri)

    @server.feature(lsp.TEXT_DOCUMENT_DID_CLOSE)
    def _closed(ls: GraftServer, params: lsp.DidCloseTextDocumentParams) -> None:  # pyright: ignore[reportUnusedFunction]
        ls.found.pop(params.text_document.uri, None)
        ls.text_document_publish_diagnostics(
            lsp.PublishDiagnosticsParams(params.text_document.uri, [])
        )

    @server.feature(lsp.TEXT_DOCUMENT_HOVER)
    def _hover(ls: GraftServer, params: lsp.HoverParams) -> lsp.Hover | None:  # pyright: ignore[reportUnusedFunction]
        return _hovered(ls, params)

    @server.feature(lsp.TEXT_DOCUMENT_DEFINITION)
    def _definition(ls: GraftServer, params: lsp.DefinitionParams) -> lsp.Location | None:  # pyright: ignore[reportUnusedFunction]
        return _defined(ls, params)

    @server.feature(
        lsp.TEXT_DOCUMENT_COMPLETION,
        lsp.CompletionOptions(trigger_characters=[".", "(", '"', "=", " "]),
    )
    def _completion(ls: GraftServer, params: lsp.CompletionParams) -> lsp.CompletionList:  # pyright: ignore[reportUnusedFunction]
        return _completed(ls, params)

    @server.feature(lsp.TEXT_DOCUMENT_FORMATTING)
    def _format(  # pyright: ignore[reportUnusedFunction]
        ls: GraftServer, params: lsp.DocumentFormattingParams
    ) -> list[lsp.TextEdit]:
        return _formatted(ls, params)

    @server.feature(
        lsp.TEXT_DOCUMENT_CODE_ACTION, lsp.CodeActionOptions([lsp.CodeActionKind.QuickFix])
    )
    def _actions(ls: GraftServer, params: lsp.CodeActionParams) -> list[lsp.CodeAction]:  # pyright: ignore[reportUnusedFunction]
        return _quick_fixes(ls, params)

    @server.feature(lsp.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
    def _symbols(  # pyright: ignore[reportUnusedFunction]
        ls: GraftServer, params: lsp.DocumentSymbolParams
    ) -> list[lsp.DocumentSymbol]:
        return _outline(ls, params)

    return server


def _hovered(ls: GraftServer, params: lsp.HoverParams) -> lsp.Hover | None:
    document, text, shift = ls.text(params.text_document.uri)
    page = Page.read(_path(params.text_document.uri), text)
    meaning = meaning_at(page, document.offset_at_position(params.position) - shift)
    said = hover(page, meaning) if meaning else None
    if meaning is None or said is None:
        return None
    token = meaning.token
    where = _range(document, token.start + shift, token.end + shift)
    return lsp.Hover(lsp.MarkupContent(lsp.MarkupKind.Markdown, said), where)


def _defined(ls: GraftServer, params: lsp.DefinitionParams) -> lsp.Location | None:
    document, text, shift = ls.text(params.text_document.uri)
    page = Page.read(_path(params.text_document.uri), text)
    meaning = meaning_at(page, document.offset_at_position(params.position) - shift)
    found = definition(page, meaning) if meaning else None
    return _location(found) if found else None


def _location(place: Location) -> lsp.Location:
    where = lsp.Range(lsp.Position(*place.start), lsp.Position(*place.end))
    return lsp.Location(_uri(str(place.path)), where)


def _completed(ls: GraftServer, params: lsp.CompletionParams) -> lsp.CompletionList:
    document, text, shift = ls.text(params.text_document.uri)
    offset = document.offset_at_position(params.position) - shift
    found = complete(_path(params.text_document.uri), text, offset, ls.known)
    items = [
        lsp.CompletionItem(
            label=f.label,
            kind=_KINDS[f.kind],
            detail=f.detail or None,
            insert_text=f.insert or None,
            sort_text=f"{i:04}",
        )
        for i, f in enumerate(found)
    ]
    return lsp.CompletionList(is_incomplete=False, items=items)


def _formatted(ls: GraftServer, params: lsp.DocumentFormattingParams) -> list[lsp.TextEdit]:
    document, text, _ = ls.text(params.text_document.uri)
    try:
        after = format_text(text, _path(params.text_document.uri))
    except GraftError as error:  # the diagnostics stand in the text already
        message = f"not formatted: {error.diagnostics[0].message}"
        ls.window_show_message(lsp.ShowMessageParams(lsp.MessageType.Warning, message))
        return []
    if after == document.source:
        return []
    return [lsp.TextEdit(_range(document, 0, len(document.source)), after)]


def _quick_fixes(ls: GraftServer, params: lsp.CodeActionParams) -> list[lsp.CodeAction]:
    """The edits that the mistakes at a place suggest, where they are of this document."""
    uri = params.text_document.uri
    document, text, shift = ls.text(uri)
    source = Source(_path(uri), text)
    first, last = (
        document.offset_at_position(p) - shift for p in (params.range.start, params.range.end)
    )
    found: list[lsp.CodeAction] = []
    for d in ls.diagnosed(uri, anew=False):
        here = d.span is not None and d.span.start <= last and first <= max(d.span.end, 1)
        if not d.edits or not here or any(e.span.source != source for e in d.edits):
            continue
        changes = [
            lsp.TextEdit(_range(document, e.span.start + shift, e.span.end + shift), e.text)
            for e in d.edits
        ]
        found.append(
            lsp.CodeAction(
                title=d.help or d.edits[0].told,
                kind=lsp.CodeActionKind.QuickFix,
                diagnostics=[_diagnostic(d, source, document, shift)],
                edit=lsp.WorkspaceEdit(changes={uri: changes}),
                is_preferred=True,
            )
        )
    return found


def _outline(ls: GraftServer, params: lsp.DocumentSymbolParams) -> list[lsp.DocumentSymbol]:
    document, text, shift = ls.text(params.text_document.uri)
    kinds = {
        s.RuleItem: lsp.SymbolKind.Class,
        s.OperatorItem: lsp.SymbolKind.Function,
        s.SetItem: lsp.SymbolKind.Variable,
        s.TestItem: lsp.SymbolKind.Method,
    }
    found: list[lsp.DocumentSymbol] = []
    for item in Page.read(_path(params.text_document.uri), text).document.items:
        if isinstance(item, (s.RuleItem, s.OperatorItem, s.SetItem, s.TestItem)):
            found.append(
                lsp.DocumentSymbol(
                    name=item.name.text,
                    kind=kinds[type(item)],
                    range=_range(document, item.span.start + shift, item.span.end + shift),
                    selection_range=_range(
                        document, item.name.span.start + shift, item.name.span.end + shift
                    ),
                    detail=item.summary if isinstance(item, s.RuleItem) else None,
                )
            )
    return found


def serve(model: str | None = None) -> None:
    """Serve until the editor hangs up."""
    build(model).start_io()
