"""SIGKILL at random points of a run, then resume: bit-equal every time, the log and the pictures too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def killed(stage, folder, seed, count):
    command = [sys.executable, "-m", "tests.distillation.kills", stage, str(folder), str(seed), str(count)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == count
    assert all(p["killed"] for p in points), points
    assert [p for p in points if not p["resumed"] or p["other"]] == [], done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process")
@pytest.mark.parametrize("stage", ["1", "2"])
def test_killed_at_three_points_and_resumed(tmp_path, stage):
    killed(stage, tmp_path, 2, 3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process")
@pytest.mark.parametrize("stage", ["1", "2", "lora"])
def test_killed_at_fifty_points_and_resumed(tmp_path, stage):
    killed(stage, tmp_path, 50, 50)
