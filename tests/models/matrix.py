"""The matrix of docs/models.md: what graftc does to each model, tried, with the diagnostic where it does not.

    python -m tests.models.matrix              every model that has no result yet, then the page
    python -m tests.models.matrix llama dit    these models again, then the page
    python -m tests.models.matrix --quick      without builds and ONNX
    python -m tests.models.matrix flux --columns "attention self-graft,operator swap"
                                               these alone; the rest of the row stays as the page has it

Results stand in `out/models/`, one file a model, so that a run can be broken off and taken up. Where names are
given, the models that have no file there keep the row that the page has.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc import verbs
from graftc.compiler import compile_model
from graftc.diagnostics import GraftError
from graftc.language.check import check
from graftc.program.analysis import Analysis, analyse
from graftc.program.capture import capture
from graftc.program.model import Model
from graftc.program.program import Program
from tests.models.case import Case
from tests.models.zoo import CASES, found, wanted

EXACT = 1e-5
GROUPS = ", groups = {text: full, image: local}"
COLUMNS = (
    "captured", "found", "attention self-graft", "MLP self-graft", "operator swap", "MLP edit",
    "structural edit", "other sizes", "outputs kept", "ONNX",
)  # fmt: skip


@dataclass
class Result:
    """One model's row: column → (state, detail). States: yes, no, none (the model has nothing of the kind)."""

    name: str
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def put(self, column: str, work: Callable[[], str], only: tuple[str, ...] = ()) -> None:
        """Run one check; its text where it passes, its diagnostic where not."""
        if only and column not in only:
            return
        try:
            self.cells[column] = ("yes", work())
        except Nothing as nothing:
            self.cells[column] = ("none", str(nothing))
        except GraftError as error:
            d = error.diagnostics[0]
            self.cells[column] = ("no", f"{d.code}: {d.message}"[:220])
        except Exception as error:
            first = (str(error).strip() or "?").splitlines()[0]
            self.cells[column] = ("no", f"{type(error).__name__}: {first}"[:220])


class Nothing(Exception):
    """The model has no site of the kind."""


class Wrong(Exception):
    """Something ran, and the result is not what it must be."""


def run(program: Program, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(program.root(*[inputs[p.name] for p in program.inputs]))


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a model's output in order, whatever they are wrapped in."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    items = vars(value).values() if hasattr(value, "__dataclass_fields__") else items
    return [t for v in items if v is not None for t in tensors(v)]


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by the names of the Program's ports: those in tuples and dicts by position and key."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, (tuple, list)):
            found |= flat_inputs({f"{name}_{i}": v for i, v in enumerate(value)})
        elif isinstance(value, dict):
            found |= flat_inputs({f"{name}_{k}": v for k, v in value.items()})
        else:
            found[name] = value
    return found


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference as a share of the largest value."""
    if len(a) != len(b):
        raise Wrong(f"{len(a)} outputs, not {len(b)}")
    return max(
        float((x - y).abs().max() / y.abs().max().clamp_min(1e-12))
        for x, y in zip(a, b, strict=True)
    )


def within(value: float, limit: float = EXACT) -> str:
    if not value <= limit:
        raise Wrong(f"differs by {value:.1e}")
    return f"{value:.0e}"


def resized(model: Model, program: Program) -> dict[str, Any]:
    """The example inputs at another size of every dynamic dimension: rows repeated, so that indices stay valid."""
    inputs = dict(model.inputs)
    more = {"batch": 1}
    for port in program.inputs:
        value = inputs.get(port.name)
        if not isinstance(value, Tensor):
            continue
        for i, size in enumerate(port.shape):
            if isinstance(size, str):
                count = value.shape[i] + more.get(size, 2)
                value = value.index_select(i, torch.arange(count) % value.shape[i])
        inputs[port.name] = value
    return inputs


def rule(match: str, edit: str, *clauses: str) -> str:
    return "rule r {\n " + "\n ".join([f"match {match}", edit, *clauses]) + "\n}\n"


def dropped(analysis: Analysis) -> list[str]:
    """The clause that lets an operator without masks and positions stand in."""
    has = set().union(*(s.has for s in analysis.of_role("self_attention"))) & {"mask", "rotary"}
    return [f"drop {', '.join(sorted(has))}"] if has else []


def first_that_applies(model: Model, texts: list[str]) -> tuple[str, Any]:
    """The first rule that compiles; the last one's diagnostic where none does."""
    for i, text in enumerate(texts):
        try:
            return text, compile_model(check(text), model)
        except GraftError:
            if i == len(texts) - 1:
                raise
    raise AssertionError


def row(case: Case, quick: bool = False, only: tuple[str, ...] = ()) -> Result:
    """Try everything on one model; `quick` leaves out what needs a build (they read NOT RUN), `only` all other columns."""
    result, start = Result(case.name), time.process_time()
    model = case.build()
    state: dict[str, Any] = {}

    def captured() -> str:
        state["program"] = capture(model)
        state["analysis"] = analyse(state["program"])
        with torch.no_grad():
            original = tensors(model.module(**model.inputs))
        return within(difference(run(state["program"], flat_inputs(model.inputs)), original), 1e-6)

    result.put("captured", captured)
    if "analysis" not in state:
        result.seconds = time.process_time() - start
        return result
    program, analysis = state["program"], state["analysis"]
    _edits(result, case, model, analysis, state, only)
    result.put("other sizes", lambda: _other_sizes(model, program, state), only)
    if not quick:
        result.put("outputs kept", lambda: _package(model, state), only)
        result.put("ONNX", lambda: _onnx(state), only)
    if "folder" in state:
        state["folder"].cleanup()
    result.seconds = time.process_time() - start
    return result


def _edits(
    result: Result,
    case: Case,
    model: Model,
    analysis: Analysis,
    state: dict[str, Any],
    only: tuple[str, ...],
) -> None:
    inputs = flat_inputs(model.inputs)
    teacher = run(analysis.program, inputs)

    def is_found() -> str:
        got, want = found(analysis), wanted(case)
        wrong = [k for k in want if (not want[k] <= got[k] if k == "has" else got[k] != want[k])]  # type: ignore[operator]
        if wrong:
            raise Wrong(", ".join(f"{k}: {got[k]}, not {want[k]}" for k in wrong))
        has = ", ".join(sorted(got["has"]))  # type: ignore[call-overload]
        counts = " + ".join(map(str, got["chains"]))  # type: ignore[call-overload]
        return f"{counts} blocks" + (f"; {has}" if has else "")

    def self_graft(role: str, text: str) -> str:
        sites = list(analysis.of_role(role))
        if not sites:
            raise Nothing(f"no {role}")
        if any(s.facts.get("form") == "linear" for s in sites):
            raise Nothing(f"{role} without softmax, which no operator of graftc is")
        compiled = compile_model(check(text), model)
        said = within(difference(run(compiled.student, inputs), teacher))
        state.setdefault("exact", compiled)
        return said

    def attention() -> str:
        roles = [
            r
            for r in ("self_attention", "cross_attention", "joint_attention")
            if list(analysis.of_role(r))
        ]
        if not roles:
            raise Nothing("no attention")
        if len(roles) > 1:  # linear attention has no like among the operators
            roles = [
                r for r in roles if all(s.facts["form"] != "linear" for s in analysis.of_role(r))
            ]
        said = [
            f"{r.partition('_')[0]} "
            + self_graft(r, rule(f"a = {r}", "replace a with attention()"))
            for r in roles
        ]
        return ", ".join(said)

    def swap() -> str:
        roles = [
            r
            for r in ("self_attention", "cross_attention", "joint_attention")
            if list(analysis.of_role(r))
        ]
        if not roles:
            raise Nothing("no attention")
        causal = any("causal" in s.has for s in analysis.of_role("self_attention"))
        edits = [f"hyena_x(kernel = 3{', causal = true' if causal else ''})"]
        edits += [f"local_attention_2d(radius = 1{GROUPS})"] if model.streams else []
        drop = dropped(analysis)
        texts = [rule(f"a = {roles[0]}", f"replace a with {e}", *drop) for e in edits]
        text, compiled = first_that_applies(model, texts)
        _is_finite(run(compiled.student, inputs))
        state["swap"] = text
        return f"{text.split('with ')[1].splitlines()[0]} at {len(compiled.plan.steps)}"

    def widen() -> str:
        if not list(analysis.of_role("mlp")):
            raise Nothing("no MLP")
        text = rule("m = mlp", f"replace m with mlp(ratio = {ratio + 1})")
        compiled = compile_model(check(text), model)
        said = within(
            difference(run(compiled.student, inputs), teacher)
        )  # new neurons start at zero
        state.setdefault("swap", text)
        return f"ratio {ratio + 1:g} at {len(compiled.plan.steps)}, {said} at start"

    def structure() -> str:
        chain = max(analysis.chains, key=len, default=None)
        if chain is None:
            raise Nothing("no chain of blocks")
        name = f'of "{chain.name}" ' if len(analysis.chains) > 1 else ""
        texts = [
            rule(
                f"a, b = each pair of blocks {name}{{0, 1}}",
                "replace with parallel(a, b, merge = linear)",
            ),
            rule(f"b = block in blocks {name}{{1}}", "skip b"),
            rule(f"m = mlp in blocks {name}{{0}}", "remove m"),
        ]
        text, compiled = first_that_applies(model, texts)
        _is_finite(run(compiled.student, inputs))
        return text.splitlines()[2].strip().removeprefix("replace with ")

    ratio = next((m.facts["ratio"] for m in analysis.of_role("mlp")), 1)
    result.put("found", is_found, only)
    result.put("attention self-graft", attention, only)
    result.put(
        "MLP self-graft",
        lambda: self_graft("mlp", rule("m = mlp", f"replace m with mlp(ratio = {ratio})")),
        only,
    )
    result.put("operator swap", swap, only)
    result.put("MLP edit", widen, only)
    result.put("structural edit", structure, only)


def _is_finite(values: list[Tensor]) -> None:
    if not all(bool(v.isfinite().all()) for v in values):
        raise Wrong("outputs are not finite")


def _other_sizes(model: Model, program: Program, state: Mapping[str, Any]) -> str:
    """The exact graft where there is one, else the capture, against the original at other sizes."""
    if not program.facts.dynamic:
        raise Wrong("; ".join(program.facts.notes) or "nothing is dynamic")
    inputs = resized(model, program)
    with torch.no_grad():
        original = tensors(model.module(**inputs))
    ours = state["exact"].student if "exact" in state else program
    said = within(difference(run(ours, flat_inputs(inputs)), original))
    return f"{', '.join(program.facts.dynamic)}: {said}"


def _package(model: Model, state: dict[str, Any]) -> str:
    """The student on disk returns what the original returns, in the same wrapping."""
    text = state.get("swap")
    if text is None:
        raise Nothing("no edit to write")
    folder = state["folder"] = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "edit.graft"
    file.write_text(text)
    build = verbs.compile(file, model, Path(folder.name) / "build")
    state["build"] = build
    inputs = flat_inputs(model.inputs)
    names = {p["name"] for p in build.config()["inputs"]}
    with torch.no_grad():
        ours = build.student()(**{n: inputs[n] for n in names})
        theirs = model.module(**model.inputs)
    if [t.shape for t in tensors(ours)] != [t.shape for t in tensors(theirs)]:
        raise Wrong("outputs of other shapes")
    fields = [k for k, v in theirs.items() if v is not None] if hasattr(theirs, "items") else None
    if fields is not None and any(not hasattr(ours, f) for f in fields):
        raise Wrong(f"outputs lack {[f for f in fields if not hasattr(ours, f)]}")
    if fields is None and type(ours) is not type(theirs):
        raise Wrong(f"{type(ours).__name__}, not {type(theirs).__name__}")
    return ", ".join(fields) if fields is not None else type(theirs).__name__


def _onnx(state: Mapping[str, Any]) -> str:
    if "build" not in state:
        raise Nothing("no build")
    verbs.export(state["build"])
    verification = verbs.verify(state["build"])
    failed = [f"{r.name}: {r.detail}" for r in verification.rungs if r.state != "PASS"]
    if failed:
        raise Wrong("; ".join(failed))
    return f"{len(verification.rungs)} rungs"


def page(results: list[Result]) -> str:
    """The page: a table of marks, then what each mark stands on."""
    marks = {"yes": "yes", "no": "**no**", "none": "—"}
    head = "| model | " + " | ".join(COLUMNS) + " |"
    lines = [
        "# Models",
        "",
        "What graftc does to each model, at a small random config in float32 on a CPU; made by `make matrix`,",
        "never by hand. `yes` was run and is within the limit (1e-5 of the largest value for what must be exact),",
        "`no` was tried and did not work: the diagnostic is below, `—`: the model has nothing of the kind.",
        "",
        f"torch {torch.__version__.partition('+')[0]}, diffusers {_version('diffusers')}, transformers {_version('transformers')}.",
        "",
        head,
        "|" + "---|" * (len(COLUMNS) + 1),
    ]  # fmt: skip
    for r in results:
        cells = [marks[r.cells[c][0]] if c in r.cells else "NOT RUN" for c in COLUMNS]
        lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
    missing = [c.name for c in CASES if c.name not in {r.name for r in results}]
    lines += [f"| {name} | " + " | ".join(["NOT RUN"] * len(COLUMNS)) + " |" for name in missing]
    lines += ["", "## What each stands on", ""]
    for r in results:
        lines += [f"### {r.name}", ""]
        lines += [
            f"- {c}: {_escaped(r.cells[c][1])}" for c in COLUMNS if c in r.cells and r.cells[c][1]
        ]
        lines += [f"- {r.seconds:.0f} s of CPU", ""]
    return "\n".join(lines).rstrip() + "\n"


def _from_page(text: str, name: str) -> Result | None:
    """A model's row as the page has it; None where it was not run."""
    row = next((r for r in text.splitlines() if r.startswith(f"| {name} |")), None)
    section = text.partition(f"### {name}\n\n")[2].partition("\n\n")[0].splitlines()
    if row is None or not section:
        return None
    said = dict(line.removeprefix("- ").split(": ", 1) for line in section if ": " in line)
    marks = {"yes": "yes", "**no**": "no", "—": "none"}
    cells = {
        column: (marks[mark], said.get(column, "").replace("&lt;", "<"))
        for column, mark in zip(COLUMNS, row.strip("| ").split(" | ")[1:], strict=True)
        if mark in marks
    }
    return Result(name, cells, float(section[-1].removeprefix("- ").partition(" ")[0]))


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", " ")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    only: tuple[str, ...] = ()
    if "--columns" in words:
        at = words.index("--columns")
        only = tuple(words[at + 1].split(","))
        words = words[:at] + words[at + 2 :]
        if unknown := set(only) - set(COLUMNS):
            raise SystemExit(f"no columns: {', '.join(unknown)}")
    quick, names = "--quick" in words, [w for w in words if w != "--quick"]
    folder = Path("out/models")
    folder.mkdir(parents=True, exist_ok=True)
    before = Path("docs/models.md").read_text() if names else ""
    for case in CASES:
        file = folder / f"{case.name.replace(' ', '-').replace('/', '-')}.json"
        chosen = any(n.lower() in case.name.lower() for n in names)
        if (file.exists() and not chosen) or (names and not chosen):
            continue
        result = row(case, quick, only)
        if only and (whole := _from_page(before, case.name)) is not None:
            result = Result(case.name, {**whole.cells, **result.cells}, whole.seconds)
        file.write_text(json.dumps(vars(result), indent=1))
        cells = " ".join(f"{c.split()[0]}={s}" for c, (s, _) in result.cells.items())
        print(f"{case.name}: {result.seconds:.0f} s  {cells}", flush=True)
        for column, (mark, detail) in result.cells.items():
            if mark == "no":
                print(f"    {column}: {detail}", flush=True)
    results: list[Result] = []
    for case in CASES:
        file = folder / f"{case.name.replace(' ', '-').replace('/', '-')}.json"
        if file.exists():
            results.append(Result(**json.loads(file.read_text())))
        elif (row_before := _from_page(before, case.name)) is not None:
            results.append(row_before)
    Path("docs/models.md").write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
