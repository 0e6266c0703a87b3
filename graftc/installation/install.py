"""Install: a build's student into the pipeline or model that its original came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graftc.diagnostics import fail
from graftc.emit.build import Build
from graftc.emit.package import load_package
from graftc.installation.classes import Generated, Record, grafted_class, original_class

FORMS = ("auto", "modules", "generated")


@dataclass(frozen=True, eq=False)
class Installed:
    """What `install` did: `where` in the target, which `form`, and the module that stands there now."""

    where: str
    form: Literal["modules", "generated"]
    module: nn.Module
    reason: str = ""

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.where or 'the model'}: {self.form} form{why}"


def install(
    target: Any, build: Build | Path | str, *, run: str | None = None, form: str = "auto"
) -> Installed:
    """Put a build's student into `target`: a diffusers pipeline, or a module that is or holds the original.

    `run`: whose weights, by default the latest finished run's; "none" for the untrained student.
    `form`: "modules" (the original's class with modules swapped: other sizes, masks and train mode
    stay), "generated" (the printed student), or "auto": modules where every edit is local to one.
    The target is changed in place, its dtype and device kept; a model that is itself the original can
    only take the generated form inside something else. Raises GraftError where the target holds no
    module of the original's class and shapes; then nothing has changed.
    """
    if form not in FORMS:
        fail("G744", f"unknown form `{form}`", site="form", wanted=", ".join(FORMS), found=form)
    opened = build if isinstance(build, Build) else Build.open(build)
    facts: Mapping[str, Any] = opened.manifest.get("forms") or {}
    record = Record(
        opened.path / "student", {**facts, "absent": opened.manifest["facts"]["absent"]}
    )
    if not facts.get("class"):
        fail("G745", "this student has no Python class to be put back into", site=str(opened.path),
             found=str(facts.get("reason", "")), help="use `Build.open(DIR).student()`")  # fmt: skip
    if form == "modules" and not facts.get("modules"):
        fail("G745", "this student has no form in the original's class", site=str(opened.path),
             found=str(facts.get("reason")), help='install it with form = "generated"')  # fmt: skip
    where, holder, original = _find(target, str(facts.get("class", "")), str(opened.path))
    student = _student(opened, run)
    if facts.get("modules") and form != "generated":
        _check_fits(original, student, facts["modules"], where)
        _swap(original, student, record)
        if holder is not None and not isinstance(holder, nn.Module):
            setattr(holder, where, original)  # a pipeline records the class of what it holds
        return Installed(where, "modules", original)
    if holder is None:
        fail("G745", "a model cannot become the generated form in place", site=str(opened.path),
             found=str(facts.get("reason", "")),
             help="give the pipeline or module that holds it, or use `Build.open(DIR).student()`")  # fmt: skip
    like = next(original.parameters())
    wrapped = Generated(student.to(device=like.device, dtype=like.dtype), original, record)
    setattr(holder, where.rpartition(".")[2], wrapped.train(original.training))
    return Installed(where, "generated", wrapped, str(facts.get("reason", "")))


def from_pretrained(folder: Path | str, *, subfolder: str = "", **options: Any) -> nn.Module:
    """A model that was saved by `save_pretrained` of an installed student; `options` go to the library.

    Raises GraftError for a folder of another kind.
    """
    directory = Path(folder) / subfolder
    record = Record.read(directory)
    base = original_class(record.form["class"])
    if (record.source / "model.safetensors").is_file():
        return Generated(load_package(record.source), _bare(base, directory), record)
    cls: Any = grafted_class(base, record)
    return cls.from_pretrained(str(directory), **options)


def _bare(base: Any, directory: Path) -> nn.Module:
    """The original without weights, for its config and its forward's signature."""
    with torch.device("meta"):
        if hasattr(base, "load_config"):
            return base.from_config(base.load_config(str(directory)))
        return base(base.config_class.from_pretrained(str(directory)))


def _find(target: Any, name: str, site: str) -> tuple[str, Any, nn.Module]:
    """(name in the target, its holder, the module) of the one module of the original's class."""
    found = [(w, h, m) for w, h, m in _modules(target) if _is_of(m, name)]
    if len(found) != 1:
        held = sorted({type(m).__name__ for _, _, m in _modules(target)})[:8]
        fail("G746", f"the target holds {len(found)} modules of the class that this build was made from",
             site=site, wanted=f"one {name}", found=", ".join(w for w, _, _ in found) or ", ".join(held),
             help="give the module itself" if found else "give the pipeline or model that was compiled")  # fmt: skip
    return found[0]


def _modules(target: Any) -> Iterator[tuple[str, Any, nn.Module]]:
    if not isinstance(target, nn.Module):  # a pipeline holds its parts as attributes
        parts: Mapping[str, Any] = getattr(target, "components", None) or vars(target)
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                yield name, target, part
        return
    for path, module in target.named_modules():
        holder = target.get_submodule(path.rpartition(".")[0]) if path else None
        yield path, holder, module


def _is_of(module: nn.Module, name: str) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}" == name for c in type(module).__mro__)


def _student(build: Build, run: str | None) -> nn.Module:
    latest = build.latest_run() if run is None else None
    if run == "none" or (run is None and latest is None):
        return build.student()
    return build.student(run if run is not None else latest.id if latest else None)


def _check_fits(
    original: nn.Module, student: nn.Module, modules: Mapping[str, Any], where: str
) -> None:
    """Every tensor of the student outside its new modules must be one of the original's, of its shape."""
    theirs = original.state_dict(keep_vars=True)
    for name, tensor in student.state_dict(keep_vars=True).items():
        if any(name.startswith(f"{p}.") for p in modules):
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = str(list(theirs[name].shape)) if name in theirs else "no such parameter"
            fail("G746", f"the target is not the model that this build was made from: `{name}` differs",
                 site=where or "the model", wanted=str(list(tensor.shape)), found=found)  # fmt: skip


@torch.no_grad()
def _swap(original: nn.Module, student: nn.Module, record: Record) -> None:
    trained = student.state_dict()
    record.swap(original, student)
    inside = tuple(f"{p}." for p in record.form["modules"])
    for name, tensor in original.state_dict().items():
        if name in trained and not name.startswith(inside):
            tensor.copy_(trained[name])
    original.__class__ = grafted_class(type(original), record)
    if any(e["mixes_tokens"] for e in record.form["modules"].values()):
        for holder in original.modules():
            for config in (
                getattr(holder, "config", None),
                getattr(holder, "generation_config", None),
            ):
                if getattr(config, "use_cache", None):
                    config.use_cache = False  # type: ignore[union-attr]
