// Starts `graftc lsp` for .graft files. What it can do is the server's.
const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

function activate() {
    const [command, ...args] = workspace.getConfiguration("graft").get("command");
    const documents = { documentSelector: [{ scheme: "file", language: "graft" }] };
    client = new LanguageClient("graft", "graftc", { command, args }, documents);
    return client.start();
}

function deactivate() {
    return client && client.stop();
}

module.exports = { activate, deactivate };
