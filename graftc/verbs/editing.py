"""What edits a model: look at it, plan, explain, compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftc.language.check import check
from graftc.loading import as_model, load_data, machine_of
from graftc.verbs.training import assemble

if TYPE_CHECKING:
    from graftc.emit.build import Build
    from graftc.language.rules import Rules
    from graftc.program.analysis import Analysis
    from graftc.program.model import Model
    from graftc.rewrite.plan import Plan
    from graftc.rewrite.whynot import Explanation


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


def _title(model: str | Model) -> str:
    """The model's name over a drawing."""
    return model.rpartition("/")[2] if isinstance(model, str) else type(model.module).__name__
