"""Exported students against the original exported the same way, and what exporting DiT-XL/2 costs.

    OMP_WAIT_POLICY=passive python benchmarks/export.py   # ratios at 64 to 4,096 tokens
    python benchmarks/export.py --xl /tmp/xl              # time and peak memory of one export of DiT-XL/2 (6 GB of disk)

Both files run in ONNX Runtime, in turns; beside them torch eager and torch.compile. Two threads that wait without spinning, and the
CPU time of both: on a machine that others use, the clock on the wall would measure the others.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import Report

import graftc
import graftc.verbs as verbs
from graftc.deploy.directory import Export, export_module
from graftc.deploy.profile import bench
from graftc.deploy.request import read_request
from graftc.emit.build import Build
from graftc.emit.package import load_package
from graftc.program.model import Reference

ROOT = Path(__file__).parents[1]
RULE = "rule hyena {\n match a = self_attention in blocks odd\n replace a with hyena_x(kernel = 4)\n distill l1\n}\n"
SIDES = {64: 8, 256: 16, 1024: 32, 4096: 64}
THREADS, ROUNDS = 2, 9
WIDTH, DEPTH, BATCH = 64, 2, 1


def original(side: int) -> graftc.Model:
    """The digits' DiT at another size, one token a pixel."""
    dit = Reference(f"{ROOT}/examples/digits/model.py:DiT").resolve()
    torch.manual_seed(0)
    module = dit(size=side, dim=WIDTH, depth=DEPTH, num_heads=2).eval()
    for (
        parameter
    ) in module.parameters():  # a fresh adaLN-zero block is the identity: nothing to compare
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = {
        "x": torch.randn(BATCH, 1, side, side),
        "t": torch.full((BATCH,), 500),
        "y": torch.ones(BATCH, dtype=torch.long),
    }
    return graftc.Model(module, inputs)


def row(tokens: int, folder: Path) -> tuple[str, ...]:
    """One line of the table; every figure from the same minutes."""
    model = original(SIDES[tokens])
    rule = folder / "hyena.graft"
    rule.write_text(RULE)
    build = verbs.compile(rule, model, folder / f"build-{tokens}", copy_teacher=True)
    exports = [_export(build, part, folder / f"{part}-{tokens}") for part in ("student", "teacher")]
    found = bench(
        *exports,
        regions=True,
        threads=THREADS,
        rounds=ROUNDS,
        clock=time.process_time,
        spinning=False,
    )
    torch.set_num_threads(THREADS)
    student, teacher = build.student(), build.teacher()
    inputs = dict(model.inputs)
    eager = _ratio(lambda: student(**inputs), lambda: teacher(**inputs))
    quick = [torch.compile(m, dynamic=False) for m in (student, teacher)]
    compiled = _ratio(lambda: quick[0](**inputs), lambda: quick[1](**inputs))
    shares = min(found.ours.attributed, found.other.attributed)
    made = (f"{tokens:,}", f"{found.other.median:.2f} ms", f"{found.ours.median:.2f} ms", f"{found.median_ratio:.3f}",
            f"{eager:.3f}", f"{compiled:.3f}", f"{100 * shares:.1f} %")  # fmt: skip
    print(made, file=sys.stderr, flush=True)
    return made


def _export(build: Build, part: str, output: Path) -> Export:
    config = build.config(part)
    request = read_request(config, dynamic=f"batch={BATCH}")
    return export_module(load_package(build.path / part), config, output, request)


def _ratio(ours: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Median against median, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for i in range(ROUNDS + 2):
            for call, kept in zip((ours, other), times, strict=True):
                start = time.process_time()
                call()
                if i >= 2:
                    kept.append(time.process_time() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def measure(sizes: Sequence[int] = tuple(SIDES)) -> Report:
    """The table of ratios."""
    with tempfile.TemporaryDirectory() as folder:
        rows = tuple(row(tokens, Path(folder)) for tokens in sizes)
    mean = statistics.geometric_mean(float(r[3]) for r in rows)
    return Report(
        "Exported student against the exported original",
        ("tokens", "original, ONNX Runtime", "student, ONNX Runtime", "ratio", "ratio, torch eager", "ratio, torch.compile",
         "time attributed to regions"),
        rows,
        (f"Student / original. Hyena-X in one attention of {DEPTH} blocks, width {WIDTH}, batch {BATCH}, float32, {THREADS} threads, CPU "
         f"time of both; medians of {ROUNDS} calls, in turns. Geometric mean of ONNX Runtime's ratios {mean:.3f}. "
         "`OMP_WAIT_POLICY=passive python benchmarks/export.py`",),
    )  # fmt: skip


def export_xl(folder: Path) -> dict[str, Any]:
    """Write DiT-XL/2 as a package in one process, export it in another, and read that one's peak memory."""
    package = folder / "package"
    code = (
        "import sys; from graftc.program.capture import capture; from graftc.program.model import load_model;"
        "from graftc.emit.package import write_package; import torch; m = load_model(sys.argv[1]);"
        "[torch.nn.init.normal_(p, std=0.02) for p in m.module.parameters()];"
        "write_package(capture(m), sys.argv[2])"
    )
    if not (package / "config.yaml").is_file():
        subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                f"{ROOT}/examples/diffusers/models.py:dit_xl2",
                str(package),
            ],
            check=True,
        )
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(folder: Path) -> None:
    """The export itself: seconds, and the most memory that the process held, Python and torch in it."""
    import graftc.emit.files as files

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start, used = time.perf_counter(), time.process_time()
    config = files.read_yaml(folder / "package" / "config.yaml")
    model = load_package(folder / "package")
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    export_module(
        model, config, folder / "out", read_request(config, to="tensorrt", dynamic="batch=1:2:2")
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    said = {
        "parameters": sum(p.numel() for p in model.parameters()), "weights": weights, "before": before, "peak": peak,
        "share": peak / weights, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used,
    }  # fmt: skip
    print(json.dumps(said))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xl", type=Path, metavar="FOLDER")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--tokens", type=int, nargs="*", choices=sorted(SIDES), help="some sizes only"
    )
    words = parser.parse_args()
    if words.child:
        child(words.child)
    elif words.xl:
        words.xl.mkdir(parents=True, exist_ok=True)
        print(json.dumps(export_xl(words.xl), indent=2))
    else:
        print(measure(words.tokens or tuple(SIDES)).markdown())


if __name__ == "__main__":
    main()
