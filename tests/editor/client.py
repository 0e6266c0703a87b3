"""An editor for tests: pygls' own client, which starts `graftc lsp` and speaks to it over stdio."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from lsprotocol import types as lsp
from pygls.lsp.client import LanguageClient

T = TypeVar("T")
_PATIENCE = 60.0  # a bound on hanging


class Editor:
    """Opens documents and asks. Places are marked in the text by `|`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.published: dict[str, list[lsp.PublishDiagnosticsParams]] = {}
        self.messages: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._client = LanguageClient("test-editor", "1")
        self._news = asyncio.Event()
        self._versions: dict[str, int] = {}
        self._client.feature(lsp.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)(lambda p: self._diagnosed(p))
        self._client.feature(lsp.WINDOW_SHOW_MESSAGE)(lambda p: self._said(p))
        self._client.feature(lsp.WINDOW_LOG_MESSAGE)(lambda p: self._said(p))
        self.wait(self._start(arguments))

    async def _start(self, arguments: tuple[str, ...]) -> None:
        await self._client.start_io(sys.executable, "-m", "graftc", "lsp", *arguments)
        self.capabilities = await self._client.initialize_async(
            lsp.InitializeParams(
                capabilities=lsp.ClientCapabilities(), root_uri=self.folder.as_uri()
            )
        )
        self._client.initialized(lsp.InitializedParams())

    def wait(self, what: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(what, _PATIENCE))

    def _diagnosed(self, params: lsp.PublishDiagnosticsParams) -> None:
        self.published.setdefault(params.uri, []).append(params)
        self._news.set()

    def _said(self, params: Any) -> None:
        self.messages.append(params.message)
        self._news.set()

    def open(self, text: str, name: str = "a.graft") -> str:
        """Opens a document, or changes the one that is open; returns its URI."""
        uri = (self.folder / name).as_uri()
        version = self._versions[uri] = self._versions.get(uri, 0) + 1
        if version == 1:
            item = lsp.TextDocumentItem(uri, "graft", version, text)
            self._client.text_document_did_open(lsp.DidOpenTextDocumentParams(item))
        else:
            self._client.text_document_did_change(
                lsp.DidChangeTextDocumentParams(
                    lsp.VersionedTextDocumentIdentifier(version=version, uri=uri),
                    [lsp.TextDocumentContentChangeWholeDocument(text)],
                )
            )
        return uri

    def close(self, uri: str) -> None:
        self._client.text_document_did_close(
            lsp.DidCloseTextDocumentParams(lsp.TextDocumentIdentifier(uri))
        )
        del self._versions[uri]

    def diagnostics(self, uri: str) -> list[lsp.Diagnostic]:
        """Those of the version that is open, once they have come."""

        async def arrive() -> list[lsp.Diagnostic]:
            while True:
                for params in self.published.get(uri, []):
                    if params.version == self._versions[uri]:
                        return list(params.diagnostics)
                self._news.clear()
                await self._news.wait()

        return self.wait(arrive())

    def said(self, words: str) -> str:
        """The first message that holds these words, once it has come."""

        async def arrive() -> str:
            while not any(words in m for m in self.messages):
                self._news.clear()
                await self._news.wait()
            return next(m for m in self.messages if words in m)

        return self.wait(arrive())

    def _at(self, marked: str, name: str) -> tuple[str, lsp.TextDocumentIdentifier, lsp.Position]:
        before, _, after = marked.partition("|")
        uri = self.open(before + after, name)
        line = before.rpartition("\n")[2]
        column = len(line.encode("utf-16-le")) // 2
        return uri, lsp.TextDocumentIdentifier(uri), lsp.Position(before.count("\n"), column)

    def fixes(self, marked: str, name: str = "a.graft") -> list[lsp.CodeAction]:
        """The quick fixes at a place."""
        uri, document, position = self._at(marked, name)
        self.diagnostics(uri)
        here = lsp.Range(position, position)
        found = self.wait(
            self._client.text_document_code_action_async(
                lsp.CodeActionParams(document, here, lsp.CodeActionContext([]))
            )
        )
        return [a for a in found or [] if isinstance(a, lsp.CodeAction)]

    def hover(self, marked: str, name: str = "a.graft") -> str:
        _, document, position = self._at(marked, name)
        found = self.wait(
            self._client.text_document_hover_async(lsp.HoverParams(document, position))
        )
        if found is None:
            return ""
        assert isinstance(found.contents, lsp.MarkupContent)
        return found.contents.value

    def complete(self, marked: str, name: str = "a.graft") -> list[str]:
        """Labels, best first."""
        _, document, position = self._at(marked, name)
        found = self.wait(
            self._client.text_document_completion_async(lsp.CompletionParams(document, position))
        )
        assert isinstance(found, lsp.CompletionList)
        return [i.label for i in sorted(found.items, key=lambda i: i.sort_text or "")]

    def definition(self, marked: str, name: str = "a.graft") -> lsp.Location | None:
        _, document, position = self._at(marked, name)
        found = self.wait(
            self._client.text_document_definition_async(lsp.DefinitionParams(document, position))
        )
        assert found is None or isinstance(found, lsp.Location)
        return found

    def format(self, text: str, name: str = "a.graft") -> list[lsp.TextEdit]:
        uri = self.open(text, name)
        options = lsp.FormattingOptions(tab_size=4, insert_spaces=True)
        params = lsp.DocumentFormattingParams(lsp.TextDocumentIdentifier(uri), options)
        return list(self.wait(self._client.text_document_formatting_async(params)) or [])

    def outline(self, text: str, name: str = "a.graft") -> list[str]:
        uri = self.open(text, name)
        params = lsp.DocumentSymbolParams(lsp.TextDocumentIdentifier(uri))
        found = self.wait(self._client.text_document_document_symbol_async(params)) or []
        return [s.name for s in found]

    def stop(self) -> int | None:
        """Shuts the server down as an editor does; its exit code."""

        async def end() -> int | None:
            await self._client.shutdown_async(None)
            self._client.exit(None)
            process = self._client._server
            assert process is not None
            return await process.wait()

        code = self.wait(end())
        self._loop.run_until_complete(self._client.stop())
        self._loop.close()
        return code
