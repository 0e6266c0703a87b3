"""The verbs: the command line's, as functions. Each takes words or values and returns values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftc.diagnostics import Diagnostic, GraftError, NotRunError, fail
from graftc.environment import doctor
from graftc.language.check import check
from graftc.loading import (
    as_build,
    as_model,
    load_data,
    machine_of,
    recorded_sources,
    task_inputs,
    task_of,
)
from graftc.verification import keep, keep_export, keep_in_build, keep_in_export, with_trajectory

if TYPE_CHECKING:
    from graftc.deploy.profile import Comparison
    from graftc.distillation import RunResult
    from graftc.distillation.assemble import Assembly
    from graftc.distillation.modelopt import ModelOptConfig
    from graftc.distillation.overfit import SiteCheck
    from graftc.distillation.plain import Distillation
    from graftc.distillation.planner import TrainingPlan
    from graftc.distillation.planner2 import Stage2Plan
    from graftc.emit.build import Build
    from graftc.emit.verify import Verification
    from graftc.language.rules import Rules
    from graftc.program.analysis import Analysis
    from graftc.program.model import Model
    from graftc.rewrite.filetest import TestResult
    from graftc.rewrite.plan import Plan
    from graftc.rewrite.whynot import Explanation

__all__ = [
    "assemble", "bench", "check", "check_distill", "compile", "distill", "doctor", "explain", "export", "export_targets", "finetune", "format_files", "inspect", "load_data", "load_targets", "plan", "plan_distill", "plan_finetune", "report", "serve_editor", "test_files", "verify",
]  # fmt: skip


def inspect(
    model: str | Model,
    *,
    weights: str | Path | None = None,
    data: str | Any = None,
    task: str | Any = None,
    samples: int = 64,
    seed: int = 0,
    cache: str | Path | None = None,
    graph: str | Path | None = None,
) -> Analysis:
    """The roles, chains of blocks, sites, parameters and FLOPs of a model, captured on the meta device.

    `model`: `file.py:function`, `package.module:function`, `diffusers:CLASS@FOLDER`, `transformers:CLASS@FOLDER`,
    a `model.pt2` of `torch.export.save`, or a `graftc.Model`. `weights`: a safetensors file, a folder of shards, or
    a state dict of `torch.save`, in place of the model's own; without `data` only names and shapes are checked.
    `graph` receives a drawing of the
    chains as SVG. With `data` the model is loaded with its weights, and each site is measured on `samples` samples
    (`Site.measured`): locality, influence, statistics; they are kept in `cache` by content. Raises GraftError.

    >>> import torch, graftc
    >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> model = graftc.Model(torch.nn.Sequential(layer), {"input": torch.zeros(2, 3, 4)})
    >>> [(s.path, s.facts["params"]) for s in graftc.inspect(model).of_role("mlp")]
    [('0', 76)]
    """
    from graftc.program.analysis import analyse
    from graftc.program.modes import captured

    loaded = as_model(model, on_meta=data is None, weights=weights)
    found = analyse(captured(loaded))
    if data is not None:
        from graftc.compiler import check_weights
        from graftc.measures import measure
        from graftc.selectors import measuring

        check_weights(loaded.module)
        on = measuring(loaded, data, task, samples=samples, seed=seed, cache=cache)
        assert on is not None
        found = measure(found, on)
    if graph is not None:
        from graftc.emit.files import write_text
        from graftc.program.overview import overview
        from graftc.reporting.drawing import draw

        write_text(Path(graph), draw(overview(found), title=_title(model)))
    return found


def plan(
    file: str | Path,
    model: str | Model,
    *,
    weights: str | Path | None = None,
    data: str | Any = None,
    task: str | Any = None,
    overrides: Mapping[str, str] | None = None,
    allow_python: Sequence[str | Path] = (),
    samples: int = 64,
    seed: int = 0,
    cache: str | Path | None = None,
    output: str | Path | None = None,
    graph: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    to: str = "torch",
) -> Plan:
    """What `file` does to `model`: sites, parameters and FLOPs before and after, origins of new weights.

    `weights` is as in `inspect`. `overrides` are the file's `set` parameters; `allow_python` are Python files that its
    rules name and that may be run; `output` receives the plan as YAML, `graph` a drawing of the chains
    before and after as SVG. Measured selectors are measured on `samples` samples of `data` through `task` (default:
    the model's own), drawn by `seed`, and kept in the folder `cache` (default: the user's cache) by content; for them
    alone the model is loaded with its weights. `device` (cpu, cuda), `dtype` (fp32, fp16, bf16) and `to` (torch, onnx,
    tensorrt) say where the student is to run: operators that have several forms get theirs by it. Raises GraftError.
    """
    from graftc.rewrite.plan import make_plan
    from graftc.rewrite.plan_text import plan_dict
    from graftc.rewrite.user_files import bind

    rules = bind(check(file, dict(overrides or {})), allow_python)
    machine = machine_of(device, dtype, to)
    analysis = _analysis(rules, model, data, task, samples, seed, cache, weights)
    made = make_plan(rules, analysis, machine)
    if output is not None:
        from graftc.emit.files import write_yaml

        write_yaml(Path(output), plan_dict(made))
    if graph is not None:
        from graftc.emit.files import write_text
        from graftc.reporting.drawing import draw

        said = plan_dict(made)
        write_text(
            Path(graph),
            draw(said["chains"], said["edits"], f"{Path(file).name} on {_title(model)}"),
        )
    return made


def explain(
    file: str | Path,
    model: str | Model,
    rule: str | None = None,
    *,
    at: str | None = None,
    weights: str | Path | None = None,
    data: str | Any = None,
    task: str | Any = None,
    overrides: Mapping[str, str] | None = None,
    allow_python: Sequence[str | Path] = (),
    samples: int = 64,
    seed: int = 0,
    cache: str | Path | None = None,
) -> tuple[Explanation, ...]:
    """For every rule of `file` (or `rule`): what it selects in `model`, and what keeps it from the places it nearly does.

    `at`: only the module with this path, however far it is. Near misses come nearest first, each as the smallest
    script of changes found, with costs that add up (1 is one plain difference). `data` and what follows it are as in
    `plan`. Raises GraftError.

    >>> import torch, graftc
    >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> model = graftc.Model(torch.nn.Sequential(layer), {"input": torch.zeros(2, 3, 4)})
    >>> text = "rule wide {\\n match m = mlp\\n where ratio(m) == 4\\n replace m with mlp(ratio = 6)\\n}"
    >>> (found,) = graftc.explain(text, model)
    >>> found.misses[0].changes[0].text, found.help
    ('ratio(m) is 2, wanted == 4', 'write `ratio(m) == 2` for `ratio(m) == 4`')
    """
    from graftc.rewrite.user_files import bind
    from graftc.rewrite.whynot import explain as explained

    rules = bind(check(file, dict(overrides or {})), allow_python)
    analysis = _analysis(rules, model, data, task, samples, seed, cache, weights)
    return explained(rules, analysis, rule, at)


def _analysis(
    rules: Rules,
    model: Any,
    data: Any,
    task: Any,
    samples: int,
    seed: int,
    cache: Any,
    weights: Any,
) -> Analysis:
    """The model's Analysis, on the meta device; with weights and measures where the rules ask for them and DATA is there."""
    from graftc.program.analysis import analyse
    from graftc.program.modes import captured
    from graftc.selectors import asks, measured_for, measuring

    measures = data is not None and asks(rules)
    loaded = as_model(model, on_meta=not measures, weights=weights)
    on = None
    if measures:
        from graftc.compiler import check_weights

        check_weights(loaded.module)
        on = measuring(loaded, data, task, samples=samples, seed=seed, cache=cache)
    elif data is not None:
        load_data(data)
    return measured_for(rules, analyse(captured(loaded)), on)


def compile(
    file: str | Path,
    model: str | Model,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    data: str | Any = None,
    task: str | Any = None,
    overrides: Mapping[str, str] | None = None,
    allow_python: Sequence[str | Path] = (),
    seed: int = 0,
    copy_teacher: bool = False,
    student_weights: str | Path | None = None,
    bank: str | Path | None = None,
    samples: int = 64,
    cache: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    to: str = "torch",
    command: str = "",
) -> Build:
    """The student and its distillation targets, as a build directory at `output`.

    With `data`, first weights that need data are solved now; without, they stay pending for `distill`.
    With `weights`, the model's are read from that file or folder (as in `inspect`), shard by shard, after the plan.
    With `student_weights` all weights come from that file instead (safetensors, or of torch.save: its key
    `ema`, or the whole); a name that is missing there or left over is an error. Measured selectors are measured on
    `samples` samples of `data`, kept in `cache` as in `plan`. `device`, `dtype` and `to` are as in `plan`.
    Raises GraftError, and then an old build at `output` is as it was.
    """
    from graftc.compiler import compile_build

    build = compile_build(
        Path(file),
        model,
        Path(output),
        data=data,
        task=task,
        overrides=dict(overrides or {}),
        allow_python=allow_python,
        seed=seed,
        copy_teacher=copy_teacher,
        command=command,
        weights=None if weights is None else Path(weights),
        student_weights=None if student_weights is None else Path(student_weights),
        samples=samples,
        cache=None if cache is None else Path(cache),
        machine=machine_of(device, dtype, to),
    )
    if bank is not None:
        assemble(build, bank, data, task=task, command=command)
    return build


def assemble(
    build: str | Path | Build,
    bank: str | Path,
    data: str | Any = None,
    *,
    task: str | Any = None,
    command: str = "",
) -> Assembly:
    """What `bank` has for a build: where that is every site, the student is put together of it, as a finished run.

    With `data`, only what was trained on it counts. Raises GraftError.
    """
    from graftc.distillation.assemble import assemble as engine

    opened = as_build(build)
    given = None if data is None else load_data(data)
    chosen = None if data is None else task_of(opened, task)
    sources = (
        {"command": command} if data is None else recorded_sources(opened, data, task, command)
    )
    return engine(opened, bank, data=given, task=chosen, sources=sources)


def load_targets(build: str | Path | Build, *, task: str | Any = None) -> Distillation:
    """A build's distillation targets as plain PyTorch: capture, students, losses and merge, for any training loop.

    `task`: by default the build's own, where there is one. Raises GraftError.
    """
    from graftc.distillation.plain import Distillation

    opened = as_build(build)
    try:
        chosen = task_of(opened, task)
    except GraftError as error:
        if error.diagnostics[0].code != "G231":
            raise
        chosen = None  # said once it is asked for
    return Distillation(opened, chosen)


def export_targets(build: str | Path | Build, output: str | Path) -> ModelOptConfig:
    """A build's targets as a Python file for NVIDIA Model-Optimizer's layer-wise distillation, with a training loop.

    Returns the pairs of modules, and what is left out or otherwise than in `distill`. Raises GraftError where no
    site fits (G583), or the file cannot be written.
    """
    from graftc.distillation.modelopt import write_modelopt
    from graftc.distillation.plain import Distillation

    opened = as_build(build)
    return write_modelopt(Distillation(opened), opened.path, Path(output))


def check_distill(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> tuple[SiteCheck, ...]:
    """Before a long run: whether each site can learn a few samples by heart; see `graftc.distillation.overfit`."""
    from graftc.distillation.overfit import check_distill as engine

    return engine(load_targets(build, task=task), load_data(data), **options)


def distill(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> RunResult:
    """Stage 1: every learned site is trained on the teacher's activations; see `graftc.distillation.distill`."""
    from graftc.distillation import distill as engine

    return _train(engine, build, data, task, _sizes(options))


def plan_distill(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> TrainingPlan:
    """What `distill` with these options would take, in time, memory and disk; nothing is written.

    `memory` and `disk` are bytes, or text such as `8GB`. Raises GraftError, also for settings that do not fit.
    """
    from graftc.distillation import plan_distill as planned

    opened = as_build(build)
    return planned(opened, load_data(data), task_of(opened, task), **_sizes(options))


def _sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with byte limits that were given as text read."""
    from graftc.units import read_size

    limits = {"memory": "--memory", "disk": "--disk"}
    return {
        name: read_size(value, limits[name]) if name in limits and value is not None else value
        for name, value in options.items()
    }


def finetune(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> RunResult:
    """Stage 2: the student is trained end to end on the task's loss; see `graftc.distillation.finetune`."""
    from graftc.distillation import finetune as engine

    return _train(engine, build, data, task, options)


def plan_finetune(
    build: str | Path | Build, data: str | Any, *, task: str | Any = None, **options: Any
) -> Stage2Plan:
    """What `finetune` with these options would take, in time, memory and disk; nothing is written. Raises GraftError."""
    from graftc.distillation import plan_finetune as planned

    opened = as_build(build)
    return planned(opened, load_data(data), task_of(opened, task), **options)


def _train(
    engine: Any, build: str | Path | Build, data: Any, task: Any, options: dict[str, Any]
) -> RunResult:
    opened = as_build(build)
    return engine(
        opened,
        load_data(data),
        task_of(opened, task),
        sources=recorded_sources(opened, data, task, str(options.pop("command", ""))),
        **options,
    )


def export(
    build: str | Path | Build,
    *,
    to: str = "onnx",
    output: str | Path | None = None,
    run: str | None = None,
    precision: str = "fp32",
    dynamic: str | None = None,
    target: str | None = None,
    opset: str = "auto",
    data: str | Any = None,
    command: str = "",
) -> Path:
    """Write the student for a runtime: a directory with model, manifest and golden files; returns its path.

    `output`: the directory; a name that ends in `.onnx` is one plain file (opset 20, float32), as is
    `DIR/student.onnx` where nothing but `run` is given. `run`: whose weights, by default the latest finished
    run's; "none" for the untrained student. `dynamic`: `batch=1:2:8,…`. `data`: what golden inputs are drawn
    from, by default the DATA that the build was compiled with. `command` is noted in the build, for `report`. Raises GraftError.
    """
    from graftc.deploy.directory import write_export
    from graftc.deploy.request import read_request
    from graftc.emit.onnx import chosen_run, export_onnx

    opened = as_build(build)
    plain = (to, precision, dynamic, target, opset, data) == (
        "onnx",
        "fp32",
        None,
        None,
        "auto",
        None,
    )
    if output is not None and Path(output).suffix == ".onnx" and not plain:
        fail("G669", "one file holds float32 at opset 20 alone", site="-o", found=str(output),
             wanted="a directory", help=f"-o {Path(output).with_suffix('')}")  # fmt: skip
    if plain and (output is None or Path(output).suffix == ".onnx"):
        file = export_onnx(opened, Path(output) if output else None, run=run)
        keep_export(opened, file, command)
        return file
    request = read_request(
        opened.config(), to=to, precision=precision, dynamic=dynamic, target=target, opset=opset
    )
    into = Path(output) if output else opened.path / "exports" / f"{to}-{precision}"
    made = write_export(
        opened, into, request, run=chosen_run(opened, run), inputs=task_inputs(opened, data)
    )
    keep_export(opened, made.path, command)
    return made.path


def verify(
    path: str | Path | Build,
    *,
    onnx: str | Path | None = None,
    data: str | Any = None,
    ep: str = "cpu",
    regions: bool = False,
    tolerance: float | None = None,
    trajectory: int | None = None,
    command: str = "",
) -> Verification:
    """Check an export; every check is PASS, FAIL or NOT RUN (reason).

    What it gave is kept in the build's `verification.yaml`, with the `command`, for `report`; of an export in its own
    manifest, and in its build's where that is at hand, as far as they can be written.

    `path`: an export directory, checked against its golden files, by `ep` and where asked by `regions`; or a
    build, whose `student.onnx` (or `onnx`) is checked against the student. A build's inputs are drawn by the
    Task from `data`, by default the DATA that it was compiled with; without either they are random.
    `trajectory`: as many steps of the Task's sampler, in torch and in ONNX Runtime, for an export whose build is
    at hand.
    """
    from graftc.deploy.directory import Export, is_export
    from graftc.emit.verify import verify as check_file

    if isinstance(path, (str, Path)) and Path(path).is_file():
        folder = Path(path).absolute().parent
        fail("G666", "this is a file: `verify` takes a directory, an export or a build", site=str(path),
             help=f"graftc verify {folder}" if is_export(folder) else "graftc verify DIR --onnx FILE, DIR its build")  # fmt: skip
    if isinstance(path, (str, Path)) and is_export(Path(path)):
        from graftc.deploy.ladder import verify_export

        if onnx is not None or data is not None:
            fail("G666", "--onnx and --data are for a build: an export is checked against its own golden files",
                 site=str(path), help="graftc verify OUT")  # fmt: skip
        opened_export = Export.open(Path(path))
        result = verify_export(opened_export, ep=ep, regions=regions, tolerance=tolerance)
        if trajectory is not None:
            result = with_trajectory(opened_export, result, trajectory)
        keep_in_export(opened_export, result, command)
        keep_in_build(opened_export, result, command)
        return result
    opened = as_build(path)
    if regions or ep != "cpu" or tolerance is not None or trajectory is not None:
        fail("G666", "--ep, --regions, --tolerance and --trajectory are for an export directory", site=str(opened.path),
             help=f"graftc export {opened.path} -o OUT; graftc verify OUT")  # fmt: skip
    result = check_file(opened, Path(onnx) if onnx else None, inputs=task_inputs(opened, data))
    keep(opened, result, command)
    return result


def report(build: str | Path | Build, output: str | Path) -> Path:
    """One HTML file on a build: edit, plan, drawing, cost, errors, curves, samples, checks, commands, versions.

    It holds all that it shows and needs no network. Only what was recorded is shown; what was not reads
    NOT RECORDED or NOT RUN. Returns the file's path. Raises GraftError.
    """
    from graftc.emit.files import read_yaml, write_text
    from graftc.reporting.gather import gather
    from graftc.reporting.page import page

    opened = as_build(build)
    kept = opened.path / "verification.yaml"
    said = read_yaml(kept) if kept.is_file() else None
    exports = opened.path / "exports.yaml"
    facts = gather(opened, said, read_yaml(exports) if exports.is_file() else None)
    write_text(Path(output), page(facts))
    return Path(output)


def bench(
    export: str | Path, *, against: str | Path, regions: bool = False, threads: int = 2
) -> Comparison:
    """Two export directories in ONNX Runtime, in turns on the same machine; where asked, time by region and rule.

    Raises GraftError for what is no export; NotRunError where ONNX Runtime cannot run one of them.
    """
    from graftc.deploy.directory import Export
    from graftc.deploy.profile import bench as measure

    return measure(Export.open(export), Export.open(against), regions=regions, threads=threads)


def format_files(files: Sequence[str | Path], *, write: bool = True) -> list[Path]:
    """Format `.graft` files; returns those that changed (or would)."""
    from graftc.language.check import read
    from graftc.language.formatter import format_text

    changed: list[Path] = []
    for file in map(Path, files):
        before = read(file).text
        after = format_text(before, str(file))
        if after != before:
            changed.append(file)
            if write:
                partial = file.with_name(f".{file.name}.partial")
                partial.write_text(after, encoding="utf-8")
                os.replace(partial, file)
    return changed


def test_files(
    files: Sequence[str | Path],
    *,
    overrides: Mapping[str, str] | None = None,  # noqa: PT028
    allow_python: Sequence[str | Path] = (),  # noqa: PT028
) -> tuple[TestResult, ...]:
    """Run the tests that `.graft` files hold: each rule on its small graph, structure and numbers.

    A failed test is in the results, with its diagnostics. Raises GraftError for a file that is wrong, or
    that holds no test.

    >>> import graftc
    >>> rule = "rule to_silu exact { match { y = x * sigmoid(x) }\\n rewrite { y = silu(x) } }\\n"
    >>> test = "test gate of to_silu { before { y = x * sigmoid(x) }\\n inputs x: tensor[2, 8]\\n expect 2 }"
    >>> (result,) = graftc.test_files([rule + test])
    >>> result.passed, result.problems[0].found
    (False, '1 match')
    """
    checked = [(file, check(file, dict(overrides or {}))) for file in files]
    for file, rules in checked:
        if not rules.tests:
            fail(
                "G478",
                "this file has no tests",
                site=rules.files[0] if rules.files else str(file),
                wanted="test NAME of RULE { before { … } inputs … expect N }",
                help="docs/language.md shows one",
            )
    from graftc.rewrite.filetest import run_test
    from graftc.rewrite.user_files import bind

    bound = [bind(rules, allow_python) for _, rules in checked]
    return tuple(run_test(t, rules.files[0]) for rules in bound for t in rules.tests)


test_files.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def serve_editor(model: str | None = None) -> None:
    """A language server over standard input and output, until the editor hangs up.

    `model` (MODEL) is read by `graftc inspect` in a process of its own, for completion. Raises NotRunError
    where pygls is not installed.
    """
    from importlib.util import find_spec

    if find_spec("pygls") is None:
        not_installed = Diagnostic(
            "G700",
            "the language server needs pygls",
            site="graftc lsp",
            help="pip install 'graftc[lsp]'",
        )
        raise NotRunError(not_installed)
    from graftc.editor.server import serve

    serve(model)


def _title(model: str | Model) -> str:
    """The model's name over a drawing."""
    return model.rpartition("/")[2] if isinstance(model, str) else type(model.module).__name__
