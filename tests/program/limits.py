"""A graftc command as a process of its own: what it prints, and what it cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def measured(*arguments: str) -> tuple[str, float, int]:
    """What `graftc ARGUMENTS` prints, its CPU seconds, its peak memory in bytes."""
    code = "import sys; from graftc.cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    text = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
