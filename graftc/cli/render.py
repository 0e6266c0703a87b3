"""What the verbs return, as tables for people and plain data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from graftc.cli.measures import measures_dict, show_measures, show_selectors

if TYPE_CHECKING:
    from pathlib import Path

    from graftc.deploy.profile import Comparison
    from graftc.distillation import RunResult
    from graftc.emit.build import Build
    from graftc.emit.verify import Verification
    from graftc.program.analysis import Analysis, Site
    from graftc.rewrite.plan import Plan
    from graftc.rewrite.price import Step

_SHOWN = ("self_attention", "cross_attention", "joint_attention", "mlp", "unknown_attention")


def wide_console(*, to_stderr: bool = False) -> Console:
    """Wide where there is no terminal: a table in a log or a pipe is not cut."""
    import sys

    width = None if (sys.stderr if to_stderr else sys.stdout).isatty() else 160
    return Console(
        width=width, markup=False, highlight=False, stderr=to_stderr
    )  # `[batch, 4]` is no markup


def count(number: float) -> str:
    """A number to three figures: 675 M, 1.19 G.

    >>> count(675_129_632), count(76), count(-1200)
    ('675 M', '76', '-1.2 k')
    """
    size = abs(number)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def wide_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="right" if column in ("parameters", "FLOPs") else "left", no_wrap=i == 0
        )
    return table


def show_analysis(analysis: Analysis) -> None:
    from graftc.diagnostics import render
    from graftc.program.dropout import told

    console = wide_console()
    program = analysis.program
    console.print(
        f"{count(analysis.parameters)} parameters, {count(analysis.flops.get('', 0))} FLOPs a forward pass of one sample"
    )
    for port in program.inputs:
        console.print(
            f"  input {port.name}: {port.dtype}[{', '.join(map(str, port.shape))}]  {port.meaning}"
        )
    for note in program.facts.notes:
        console.print(f"  note: {note}")
    if dropped := told(program):
        console.print(f"  note: in train mode {dropped}, which a student keeps")
    for warning in program.facts.warnings:
        console.print(render(warning))
    for chain in analysis.chains:
        console.print(f"\nchain `{chain.name}`: {len(chain)} blocks, 0..{len(chain) - 1}")
        table = wide_table("block", "site", "role", "facts", "parameters", "FLOPs")
        for index, path in enumerate(chain.paths):
            inside = [s for s in analysis.sites if s.block == (chain.name, index)]
            block = next(s for s in inside if s.path == path)
            table.add_row(
                str(index),
                path,
                "block",
                "",
                count(_num(block, "params")),
                count(_num(block, "flops")),
            )
            for site in inside:
                if site.role in _SHOWN:
                    table.add_row(
                        "",
                        site.path,
                        site.role,
                        facts_text(site),
                        count(_num(site, "params")),
                        count(_num(site, "flops")),
                    )
        console.print(table)
    outside = [s for s in analysis.sites if s.block is None and s.role != "unknown"]
    if outside:
        console.print("\noutside the chains")
        table = wide_table("site", "role", "facts", "parameters", "FLOPs")
        for site in outside:
            table.add_row(
                site.path,
                site.role,
                facts_text(site),
                count(_num(site, "params")),
                count(_num(site, "flops")),
            )
        console.print(table)
    if analysis.measured is not None:
        show_measures(analysis, console)


def _num(site: Site, name: str) -> int:
    value = site.facts.get(name)
    return value if isinstance(value, int) else 0


def facts_text(site: Site) -> str:
    """A site's facts in a few words."""
    f = site.facts
    words: list[str] = []
    if "heads" in f:
        grouped = f", {f['kv_heads']} kv" if f["kv_heads"] != f["heads"] else ""
        words.append(f"{f['heads']} heads of {f['head_dim']}{grouped}")
    if "ratio" in f:
        words.append(f"ratio {f['ratio']}, {f['activation']}{', gated' if f['gated'] else ''}")
    if "in_features" in f:
        words.append(f"{f['in_features']} → {f['out_features']}")
    if "eps" in f:
        words.append(f"{f['kind']}, eps {f['eps']:g}")
    if "tokens" in f and site.role in _SHOWN:
        words.append(f"{f['tokens']} tokens")
    words += sorted(site.has)
    return ", ".join(words)


def analysis_dict(analysis: Analysis) -> dict[str, Any]:
    from graftc.diagnostics import to_json
    from graftc.program.dropout import told
    from graftc.rewrite.plan_text import measured_on_dict

    return {
        "parameters": analysis.parameters,
        "flops": analysis.flops.get("", 0),
        "inputs": [
            {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "meaning": p.meaning}
            for p in analysis.program.inputs
        ],
        "notes": list(analysis.program.facts.notes),
        "dropout": told(analysis.program),
        "warnings": [to_json(w) for w in analysis.program.facts.warnings],
        "chains": [{"name": c.name, "blocks": list(c.paths)} for c in analysis.chains],
        "sites": [
            {
                "path": s.path, "role": s.role, "class": s.class_name,
                "block": {"chain": s.block[0], "index": s.block[1]} if s.block else None,
                "facts": dict(s.facts), "has": sorted(s.has), **measures_dict(s),
            }
            for s in analysis.sites
        ],
        **({"measured_on": measured_on_dict(analysis.measured)} if analysis.measured else {}),
    }  # fmt: skip


def show_plan(plan: Plan) -> None:
    from graftc.rewrite.form_texts import form_texts

    console = wide_console()
    table = wide_table("site", "rule", "becomes", "parameters", "FLOPs")
    for step in plan.steps:
        table.add_row(
            step.edit.name,
            f"{step.edit.rule.name} ({step.edit.origin})",
            _after(step),
            f"{count(step.before.params)} → {count(step.after.params)}",
            f"{count(step.before.flops)} → {count(step.after.flops)}",
        )
    console.print(table)
    for line in dict.fromkeys(
        f"{s.edit.rule.name}: {_weights(s)}" for s in plan.steps if s.origins
    ):
        console.print(f"first weights of {line}")
    for line in dict.fromkeys(_formulas(s) for s in plan.steps if s.edit.new):
        console.print(line)
    if forms := form_texts(plan.edits):
        console.print(f"forms, to run on {plan.machine}: {'; '.join(forms)}")
    for matches in plan.selections:
        for f in matches.filtered:
            console.print(f"rule `{matches.rule.name}` left {f.path}: {f.reason}")
    show_selectors(plan, console)
    for line in plan.checks:
        console.print(line)
    dropped = sum(len(s.dropped) for s in plan.steps)
    if dropped:
        console.print(f"\n{dropped} teacher parameters are dropped; `--format json` lists them")
    (p0, p1), (f0, f1) = plan.parameters, plan.flops
    console.print(f"\nparameters {p0:,} → {p1:,} ({_percent(p0, p1)})")
    console.print(
        f"FLOPs of a forward pass of one sample {count(f0)} → {count(f1)} ({_percent(f0, f1)})"
    )


def _formulas(step: Step) -> str:
    """FLOPs of the operator and of its featurisers apart, for N tokens."""
    from graftc.rewrite.price import formula

    new = step.edit.new[-1]
    operator, featurisers = formula(new)
    return (
        f"FLOPs of {step.edit.rule.name} for N tokens: {new.spec.name} {operator}, "
        f"its featurisers (projections, convolutions) {featurisers}"
    )


def _after(step: Step) -> str:
    from graftc.rewrite.plan_text import after_text

    every = f", in all {step.runs} runs" if step.runs > 1 else ""
    return after_text(step.edit) + every


def _weights(step: Step) -> str:
    """Where the new parameters come from; pending ones need data."""
    lines = dict.fromkeys(
        f"{o.parameter.rpartition('.')[0].rpartition('.')[2] or o.parameter}: {o.text}"
        + (" (needs data)" if o.pending else "")
        for o in step.origins
    )
    return "; ".join(lines)


def _percent(before: int, after: int) -> str:
    return f"{100 * (after - before) / before:+.2f} %" if before else "new"


def show_build(build: Build, *, say_next: bool = True) -> None:
    console = wide_console()
    totals = build.plan["totals"]["parameters"]
    console.print(
        f"built {build.path}: {len(build.plan['edits'])} edits, "
        f"{totals['before']:,} → {totals['after']:,} parameters"
    )
    sites = build.targets["sites"]
    pending = sum(bool(s["pending"]) for s in sites)
    for line in build.manifest.get("checks", []):
        console.print(f"  {line}")
    for note in build.manifest.get("notes", []):
        console.print(note)
    reason = (build.manifest.get("forms") or {}).get("reason")
    if reason:
        console.print(f"  graftc.install gives the generated form alone: {reason}")
    trained = sum(s["budget"]["steps"] != 0 for s in sites)
    said = [f"{trained} sites to distil"] if trained else []
    if trained < len(sites):
        said.append(f"{len(sites) - trained} that keep their first weights (no `distill`)")
    if pending:
        said.append(f"{pending} with first weights that wait for data")
    if said:
        console.print(f"  {', '.join(said)}")
    if sites and say_next:
        verb = "distill" if trained or pending else "finetune"
        console.print(f"next: graftc {verb} {build.path} -d DATA")


def show_run(result: RunResult) -> None:
    console = wide_console()
    console.print(
        f"run {result.id}: {result.steps} steps in {result.seconds:.0f} s; weights in {result.weights}"
    )
    if result.sites:
        table = wide_table("site", "operator", "error at start", "error at end", "steps")
        for site in result.sites:
            skipped = f", {site.skipped_steps} skipped" if site.skipped_steps else ""
            table.add_row(
                site.key,
                site.operator,
                f"{site.error_start:.4f}",
                f"{site.error_end:.4f}",
                f"{site.steps}{skipped}" + (" (from the bank)" if site.reused else ""),
            )
        console.print(table)
        console.print("errors are of the site's output on held-out samples, relative to its energy")
        for site in result.sites:
            if site.reused:
                console.print(f"  {site.key} was not trained again: {site.reused}")
    for name, value in result.metrics.items():
        console.print(f"  {name}: {value:.5g}")
    for told in result.warnings:
        console.print(f"warning {told}")


def run_dict(result: RunResult) -> dict[str, Any]:
    """A finished run as plain data."""
    from dataclasses import asdict

    return {**asdict(result), "path": str(result.path), "weights": str(result.weights)}


def show_export(written: Path) -> None:
    """Where an export is, and for a directory what it is for, what was proved and what stays in float32."""
    console = wide_console()
    console.print(f"wrote {written}")
    if not written.is_dir():
        return
    from graftc.deploy.directory import Export

    said = Export.open(written).manifest
    opset, precision, golden = said["opset"], said["precision"], said["golden"]
    console.print(f"  opset {opset['version']}: {opset['why']}")
    for name, entry in said["dynamic"].items():
        seen = ", ".join(map(str, entry["verified"]))
        console.print(
            f"  {name} declared {entry['declared']}, proved {entry['proved']}, golden files at {seen}"
        )
    if precision["type"] != "fp32":
        console.print(
            f"  {precision['type']}: {precision['error']:.1e} relative L2, {len(precision['islands'])} float32 islands"
        )
        for path, why in precision["islands"].items():
            console.print(f"    {path}: {why}")
    console.print(
        f"  golden inputs drawn {golden['drawn']}"
        if "by the" in golden["drawn"]
        else f"  golden inputs {golden['drawn']}"
    )
    if golden["still_regions"]:
        console.print(
            f"  moved by none of them (below 1 % of the output): {', '.join(golden['still_regions'][:8])}"
        )
    operators = said["tensorrt"]["operators"]
    console.print(f"  TensorRT operators: {operators['state']} ({operators['source']})")
    if (written / "trt").is_dir():
        console.print(
            "  TensorRT engine: NOT RUN (build it with trt/build.sh on the GPU that it is for)"
        )
    console.print(f"next: graftc verify {written}")


def comparison_dict(found: Comparison) -> dict[str, Any]:
    return {
        "ratio": found.ratio,
        **{
            name: {
                "path": str(t.path), "milliseconds": t.milliseconds, "median": t.median,
                "regions": dict(t.regions), "rules": dict(t.rules), "attributed": t.attributed,
            }
            for name, t in (("ours", found.ours), ("other", found.other))
        },
    }  # fmt: skip


def show_comparison(found: Comparison) -> None:
    console = wide_console()
    for timing in (found.ours, found.other):
        console.print(
            f"{timing.path}: {timing.milliseconds:.2f} ms a call (median {timing.median:.2f})"
        )
        if timing.regions:
            console.print(
                f"  {100 * timing.attributed:.1f} % of the time in nodes is attributed; by rule:"
            )
            for rule, share in timing.rules.items():
                console.print(f"    {100 * share:5.1f} %  {rule}")
            for region, share in list(timing.regions.items())[:12]:
                console.print(f"      {100 * share:5.1f} %  {region}")
    console.print(f"time of the first as a share of the second: {found.ratio:.3f}")


def verification_dict(result: Verification) -> dict[str, Any]:
    return {
        "rungs": [
            {"name": r.name, "state": r.state, "detail": r.detail, "asked": r.asked}
            for r in result.rungs
        ]
    }


def show_verification(result: Verification) -> None:
    table = wide_table("check", "", "detail")
    for rung in result.rungs:
        table.add_row(rung.name, rung.state, rung.detail)
    wide_console().print(table)


def show_doctor(findings: list[dict[str, str]]) -> None:
    table = wide_table("what", "", "detail")
    for f in findings:
        table.add_row(f["what"], f["state"], f["detail"])
    wide_console().print(table)
