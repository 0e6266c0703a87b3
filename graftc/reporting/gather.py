"""What a build's folder tells for its report, as one value: nothing is computed that was not recorded."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from graftc.diagnostics import fail

_MOST_IMAGES = 24
_LARGEST_IMAGE = 4_000_000


class RunLike(Protocol):
    """A run, as `graftc.emit.build.RunInfo`."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def info(self) -> Mapping[str, Any]: ...


class BuildLike(Protocol):
    """A build, as `graftc.emit.build.Build`."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def plan(self) -> Mapping[str, Any]: ...

    @property
    def targets(self) -> Mapping[str, Any]: ...

    def runs(self) -> Sequence[RunLike]: ...


@dataclass(frozen=True)
class RunFacts:
    """A run: what `run.yaml` says, and its log's curves (name → (step, value)) and error bins by site."""

    id: str
    info: Mapping[str, Any]
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    bins: Mapping[str, tuple[tuple[str, float], ...]]

    @property
    def sites(self) -> list[Mapping[str, Any]]:
        return list((self.info.get("result") or {}).get("sites") or [])

    @property
    def warnings(self) -> list[str]:
        """What to know of its figures: that its DATA was a single sample."""
        return [str(w) for w in (self.info.get("result") or {}).get("warnings") or []]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return (self.info.get("result") or {}).get("metrics") or {}


@dataclass(frozen=True)
class Image:
    """A sheet of samples: a picture, as a data URI, or the text of one of tokens."""

    name: str
    uri: str
    text: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows. `rules` is None where the file is gone or was changed since."""

    name: str
    manifest: Mapping[str, Any]
    plan: Mapping[str, Any]
    targets: Mapping[str, Any]
    runs: tuple[RunFacts, ...]
    rules: tuple[tuple[str, str], ...] | None
    images: tuple[Image, ...]
    images_left_out: int
    verification: Mapping[str, Any] | None
    exports: Mapping[str, Any]


def gather(
    build: BuildLike,
    verification: Mapping[str, Any] | None = None,
    exports: Mapping[str, Any] | None = None,
) -> Facts:
    """The facts of a build; `verification` and `exports` are what `verification.yaml` and `exports.yaml` hold."""
    images, left_out = _images(build.path)
    return Facts(
        name=build.path.name,
        manifest=build.manifest,
        plan=build.plan,
        targets=build.targets,
        runs=tuple(_run(r) for r in build.runs()),
        rules=_rules(build.manifest.get("rules") or {}),
        images=images,
        images_left_out=left_out,
        verification=verification,
        exports=exports or {},
    )


def _rules(said: Mapping[str, Any]) -> tuple[tuple[str, str], ...] | None:
    """The texts of the rules, if they are still those that were compiled."""
    found: list[tuple[str, str]] = []
    for name in said.get("read") or []:
        try:
            found.append((str(name), Path(name).read_bytes().decode("utf-8-sig")))
        except (OSError, UnicodeDecodeError):
            return None
    digest = hashlib.sha256("\0".join(t for _, t in found).encode("utf-8", "replace")).hexdigest()
    return tuple(found) if found and digest == said.get("sha256") else None


def _run(run: RunLike) -> RunFacts:
    """A log's `step` events become curves; `bins` events ({site, edges, errors}) error by timestep.

    Of a site that came from a bank the log has no such event, and the run's result has what the bank keeps.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    bins: dict[str, tuple[tuple[str, float], ...]] = {}
    for event in _events(run.path / "log.jsonl"):
        if event.get("event") == "step" and isinstance(event.get("step"), int):
            values = event.get("values") or {k: v for k, v in event.items() if k not in _NO_CURVE}
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    curves.setdefault(str(name), []).append((event["step"], float(value)))
        elif event.get("event") == "bins":
            bins[str(event["site"])] = _named(event)
    for site in (run.info.get("result") or {}).get("sites") or ():
        if kept := site.get("bins"):
            number = site.get("candidate", 0)
            bins.setdefault(f"{site['name']}/{number}" if number else site["name"], _named(kept))
    return RunFacts(run.id, run.info, {k: tuple(v) for k, v in curves.items()}, bins)


def _named(bins: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The error of each bin: "0 to 250", 0.03."""
    names = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(bins["edges"])]
    return tuple(zip(names, map(float, bins["errors"]), strict=True))


_NO_CURVE = ("event", "step", "generation", "values")


def _events(log: Path) -> list[dict[str, Any]]:
    """The log's lines; a last line that a killed run left half-written is no event."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found: list[dict[str, Any]] = []
    for at, line in enumerate(lines):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            if at + 1 < len(lines):
                fail("G701", "the run's log is damaged", site=f"{log}:{at + 1}",
                     help="take the line out, or the run")  # fmt: skip
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def _image(folder: Path, path: Path) -> Image:
    name = str(path.relative_to(folder))
    if path.suffix == ".txt":
        return Image(name, "", path.read_text(encoding="utf-8", errors="replace"))
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Image(name, "data:image/png;base64," + data)


def _images(folder: Path) -> tuple[tuple[Image, ...], int]:
    """Sheets of samples that lie in the build, in `samples/`, and in its runs."""
    paths = [
        *sorted(folder.glob("*.png")),
        *sorted(folder.glob("samples/*.png")),
        *sorted(folder.glob("runs/*/*.png")),
        *sorted(folder.glob("runs/*/samples/*.png")),
        *sorted(folder.glob("runs/*/samples/*.txt")),  # of a model of language
    ]
    small = [p for p in paths if p.stat().st_size <= _LARGEST_IMAGE]
    shown = [_image(folder, p) for p in small[:_MOST_IMAGES]]
    return tuple(shown), len(paths) - len(shown)
