"""The report on a build: one HTML file that holds everything it shows, and opens from disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any

from graftc.reporting.charts import bars, lines
from graftc.reporting.drawing import draw
from graftc.reporting.gather import Facts, Image, RunFacts

_STYLE = """
body { font: 15px/1.5 "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; color: #1b1f24; background: #fff;
       max-width: 1080px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2.2em; border-bottom: 1px solid #d0d7de; }
h3 { font-size: 1em; margin-bottom: .3em; }
table { border-collapse: collapse; margin: .6em 0; } td, th { padding: .25em .8em .25em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #8c959f; } td.n, th.n { text-align: right; }
pre { background: #f6f8fa; padding: .8em; overflow-x: auto; } code, pre { font-family: "DejaVu Sans Mono", Consolas, monospace; font-size: .88em; }
.wide { overflow-x: auto; } .faint { color: #57606a; } svg { max-width: none; }
.PASS::before { content: "✓ "; } .FAIL { font-weight: bold; } .FAIL::before { content: "✗ "; } .NOT::before { content: "– "; }
td:first-child, .PASS, .FAIL, .NOT { white-space: nowrap; } figure { display: inline-block; margin: 0 1em 1em 0; } figure pre { max-width: 34em; max-height: 24em; overflow: auto; white-space: pre-wrap; margin: 0; } figure img { max-width: 480px; image-rendering: pixelated; border: 1px solid #d0d7de; }
nav a { margin-right: 1em; }
.pair { display: flex; flex-wrap: wrap; } .heat { display: inline-block; padding: 0 .4em; min-width: 3.5em; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NOT_RECORDED = "NOT RECORDED"


def page(facts: Facts) -> str:
    """The whole file. It refers to nothing outside itself, and runs no script."""
    sections = [
        ("edit", "The edit", _edit(facts)),
        ("plan", "The plan", _plan(facts.plan)),
        ("drawing", "Before and after", _drawing(facts)),
        ("cost", "Cost", _cost(facts.plan)),
        ("errors", "Errors by site", _errors(facts.runs, _timed(facts.targets))),
        ("curves", "Curves", _curves(facts.runs)),
        ("samples", "Samples", _samples(facts)),
        ("verification", "Verification", _verification(facts)),
        ("record", "Commands and versions", _record(facts)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "\n".join(f'<h2 id="{key}">{title}</h2>\n{content}' for key, title, content in sections)
    title = escape(f"graftc report: {facts.name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _table(
    head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()
) -> str:
    right = set(numbers)

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in right else ''}>{c if isinstance(c, _Html) else escape(str(c))}</{tag}>"
            for i, c in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", head)}</tr>\n{body}</table></div>'


class _Html(str):
    """Text that is markup already."""


def _note(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def _edit(facts: Facts) -> str:
    said = facts.manifest.get("rules") or {}
    out = f"<p><code>{escape(str(said.get('file', '')))}</code> on <code>{escape(_reference(facts.manifest.get('model')))}</code></p>"
    if facts.rules is None:
        return out + _note(
            f"The text is not shown: the file is gone, or it was changed since (sha256 {said.get('sha256', 'unknown')})."
        )
    for name, text in facts.rules:
        out += (
            f"<h3>{escape(name)}</h3>" if len(facts.rules) > 1 else ""
        ) + f"<pre>{escape(text)}</pre>"
    changed = said.get("parameters") or {}
    if changed:
        out += _table(("parameter", "value"), changed.items())
    return out


def _reference(what: Any) -> str:
    return (
        str(what.get("reference") or what.get("absolute") or what)
        if isinstance(what, Mapping)
        else "a Python object"
    )


def _plan(plan: Mapping[str, Any]) -> str:
    rows = [
        (e["site"], e["rule"], e["contract"], e["after"],
         f"{e['parameters']['before']:,} → {e['parameters']['after']:,}",
         f"{e['flops']['before']:,} → {e['flops']['after']:,}")
        for e in plan.get("edits", [])
    ]  # fmt: skip
    out = _table(("site", "rule", "contract", "becomes", "parameters", "FLOPs"), rows, (4, 5))
    weights = [
        (w["parameter"], w["from"], "needs data" if w["pending"] else "")
        for e in plan.get("edits", [])
        for w in e.get("weights", [])
    ]
    if weights:
        inner = _table(("parameter", "first weights", ""), weights)
        out += f"<details><summary>first weights of {len(weights)} new parameters</summary>{inner}</details>"
    dropped = [d for e in plan.get("edits", []) for d in e.get("dropped", [])]
    if dropped:
        listed = "".join(f"<li><code>{escape(d)}</code></li>" for d in dropped)
        out += f"<details><summary>{len(dropped)} teacher parameters are dropped</summary><ul>{listed}</ul></details>"
    filtered = plan.get("filtered") or []
    if filtered:
        out += _table(
            ("left alone by `where`", "rule", "reason"),
            [(f["path"], f["rule"], f["reason"]) for f in filtered],
        )
    return out


def _drawing(facts: Facts) -> str:
    chains = facts.plan.get("chains")
    if chains is None:
        return _note(
            "NOT RECORDED: this build was compiled by a version of graftc that kept no chains. Compile it again."
        )
    return f'<div class="wide">{draw(chains, facts.plan.get("edits", []), facts.name)}</div>'


def _cost(plan: Mapping[str, Any]) -> str:
    totals = plan.get("totals") or {}
    rows: list[tuple[str, str, str, str]] = []
    for key, name in (
        ("parameters", "parameters"),
        ("flops", "FLOPs of a forward pass of one sample"),
    ):
        before, after = (int(totals.get(key, {}).get(k, 0)) for k in ("before", "after"))
        change = f"{100 * (after - before) / before:+.2f} %" if before else "new"
        rows.append((name, f"{before:,}", f"{after:,}", change))
    return _table(("", "before", "after", "change"), rows, (1, 2, 3)) + _note(
        "FLOPs are counted from the graph, not measured."
    )


def _site(result: Mapping[str, Any]) -> str:
    """The site, and which candidate of `one of` where it is not the student's own."""
    candidate = result.get("candidate", 0)
    return f"{result['name']}/{candidate}" if candidate else str(result["name"])


def _errors(runs: Sequence[RunFacts], timed: bool) -> str:
    out = ""
    for run in runs:
        if not run.sites:
            continue
        rows = [(_site(s), float(s["error_start"]), float(s["error_end"])) for s in run.sites]
        out += f"<h3>run {escape(run.id)}</h3>"
        out += f'<div class="wide">{bars(rows, "at the start", "at the end", f"error by site, run {run.id}")}</div>'
        out += _table(
            ("site", "operator", "error at start", "at end", "loss at start", "at end", "steps", "skipped"),
            [(_site(s), s["operator"], *(f"{s[k]:.4g}" for k in ("error_start", "error_end", "loss_start", "loss_end")), s["steps"], s.get("skipped_steps", 0)) for s in run.sites],
            range(2, 8),
        )  # fmt: skip
        out += _bins(run, timed)
    if not out:
        return _note(
            f"{NOT_RECORDED}: no run of stage 1 is finished (`graftc distill DIR -d DATA`)."
        )
    return out + _note(
        "Errors are of the site's output on held-out samples, ‖student − teacher‖² / ‖teacher‖²."
    )


def _timed(targets: Mapping[str, Any]) -> bool:
    """Whether an input of the model is known to be a timestep."""
    return any(i.get("meaning") == "timestep" for i in targets.get("inputs") or ())


def _bins(run: RunFacts, timed: bool) -> str:
    if not run.bins and not timed:
        return _note(
            'By timestep: none, since no input of the model is known as one. If one is, say so in MODEL (meanings = {"t": "timestep"}),'
            " or let the task's prepare give the times as its target t; then compile and distil again."
        )
    if not run.bins:
        return _note(
            f"By timestep bin: {NOT_RECORDED} by this run: its version of graftc measured none, or the batches had not one time a sample."
            " A new run records it (`graftc distill DIR -d DATA`)."
        )
    out = "<h3>by timestep</h3>"
    groups: dict[tuple[str, ...], list[tuple[str, list[float]]]] = {}
    for site, found in run.bins.items():  # sites measured on the same samples share a table
        key = tuple(name for name, _ in found)
        groups.setdefault(key, []).append((site, [e for _, e in found]))
    for names, sites in groups.items():
        worst = max((e for _, errors in sites for e in errors if isfinite(e)), default=0.0)
        rows = [(site, *(_heat(e, worst) for e in errors)) for site, errors in sites]
        out += _table(("site", *names), rows, range(1, len(names) + 1))
    return out + _note("The darker, the larger the error beside the largest of the table.")


def _heat(error: float, worst: float) -> _Html:
    """A number on a ground that darkens with it; the text stays dark on light."""
    share = min(1.0, error / worst) if worst > 0 and isfinite(error) else 0.0
    return _Html(
        f'<span class="heat" style="background: rgba(0, 114, 178, {0.45 * share:.2f})">{error:.4g}</span>'
    )


def _curves(runs: Sequence[RunFacts]) -> str:
    out = ""
    for run in runs:
        if run.curves:
            title = f"run {run.id}, {run.info.get('stage', '')}, by step"
            out += f'<div class="wide">{lines(run.curves, title)}</div>'
        out += "".join(_note(f"Warning, run {run.id}: {told}.") for told in run.warnings)
        if run.metrics:
            out += _table(
                ("metric", "value"),
                [(k, f"{v:.6g}" if isinstance(v, float) else v) for k, v in run.metrics.items()],
                (1,),
            )
    return out or _note(f"{NOT_RECORDED}: this build has no run with a log.")


def _samples(facts: Facts) -> str:
    """Folder by folder: the teacher's beside the student's, then those along the way."""
    folders: dict[str, list[Image]] = {}
    for image in facts.images:
        folders.setdefault(image.name.rpartition("/")[0], []).append(image)
    out = ""
    for folder, images in folders.items():
        out += f"<h3>{escape(folder or facts.name)}</h3>"
        ends = sorted((i for i in images if _place(i) < 2), key=_place)
        others = [i for i in images if _place(i) == 2]
        if ends:
            out += f'<div class="pair">{"".join(map(_figure, ends))}</div>'
        out += "".join(map(_figure, others))
    if facts.images_left_out:
        out += _note(
            f"{facts.images_left_out} more images are not shown (too many, or larger than 4 MB)."
        )
    return out or _note(
        f"{NOT_RECORDED}: no sheet of samples lies in this build, its `samples/` or its runs (`graftc finetune DIR --preview N` draws them)."
    )


def _place(image: Image) -> int:
    return {"teacher": 0, "student": 1}.get(_stem(image), 2)


def _stem(image: Image) -> str:
    return image.name.rpartition("/")[2].rpartition(".")[0]


def _figure(image: Image) -> str:
    name = escape(image.name)
    shown = escape(_stem(image))
    if image.text:
        return f"<figure><pre>{escape(image.text)}</pre><figcaption>{shown}</figcaption></figure>"
    return f'<figure><img src="{image.uri}" alt="{name}" title="{name}"><figcaption>{shown}</figcaption></figure>'


def _verification(facts: Facts) -> str:
    said = facts.verification
    if said is None:
        return _note("NOT RUN: `graftc verify DIR` has left no record in this build.")
    rows = [
        (
            r["name"],
            _Html(
                f'<span class="{str(r["state"]).partition(" ")[0]}">{escape(str(r["state"]))}</span>'
            ),
            r["detail"],
        )
        for r in said["rungs"]
    ]
    return f"<p><code>{escape(str(said['file']))}</code></p>" + _table(
        ("check", "", "detail"), rows
    )


def _record(facts: Facts) -> str:
    manifest = facts.manifest
    commands = [("compile", manifest.get("command") or "from Python")]
    for run in facts.runs:
        sources = run.info.get("sources") or {}
        commands.append((f"run {run.id}", sources.get("command") or "from Python"))
    for found in facts.exports.values():
        commands.append(("export", found.get("command") or "from Python"))
    if facts.verification is not None:
        commands.append(("verify", facts.verification.get("command") or "from Python"))
    out = _table(
        ("what", "command"), [(w, _Html(f"<code>{escape(str(c))}</code>")) for w, c in commands]
    )
    for run in facts.runs:
        options = {k: v for k, v in (run.info.get("options") or {}).items() if v is not None}
        said = ", ".join(f"{k} = {v}" for k, v in options.items())
        status = run.info.get("status", "")
        out += f"<p>run {escape(run.id)}: {escape(str(status))}; {escape(said)}</p>"
    versions = dict(manifest.get("versions") or {})
    rows = [(k, versions[k]) for k in versions]
    for run in facts.runs:
        rows += [
            (f"{k} of run {run.id}", v)
            for k, v in (run.info.get("versions") or {}).items()
            if versions.get(k) != v
        ]
    if facts.verification is not None:
        rows += [
            (f"{k} of verify", v)
            for k, v in (facts.verification.get("versions") or {}).items()
            if versions.get(k) != v
        ]
    out += _table(("package", "version"), rows)
    hashes = [("rules", (manifest.get("rules") or {}).get("sha256", ""))]
    hashes += [(k, (manifest.get(k) or {}).get("sha256", "")) for k in ("model", "data", "task")]
    hashes += [(f"weights of the {k}", v) for k, v in (manifest.get("weights") or {}).items()]
    out += _table(
        ("sha256 of", ""), [(k, _Html(f"<code>{escape(str(v))}</code>")) for k, v in hashes if v]
    )
    checks = manifest.get("checks") or []
    if checks:
        out += (
            "<h3>checked when compiled</h3><ul>"
            + "".join(f"<li>{escape(str(c))}</li>" for c in checks)
            + "</ul>"
        )
    return out
