"""The golden inputs, for polygraphy's `--data-loader-script`. It needs numpy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy


def load_data() -> Iterator[dict[str, Any]]:
    """Named inputs of each golden case."""
    golden = Path(__file__).resolve().parents[1] / "golden"
    for case in json.loads((golden / "golden.json").read_text())["cases"]:
        with numpy.load(golden / case["name"] / "inputs.npz", allow_pickle=False) as arrays:
            yield {name: arrays[name] for name in arrays.files}
