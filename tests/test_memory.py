"""Compiling a model as large as the paper's holds its weights once: the peak over what the imports take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import resource, sys
import diffusers, torch.export, torch.onnx
from diffusers import DiTTransformer2DModel
import graftc.compiler
from graftc import verbs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
verbs.compile(*sys.argv[1:4])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
RULES = """
rule hyena {
    match   a = self_attention in blocks odd
    replace a with hyena_x(kernel = 4)
    distill l1, samples = 8k
    expect  14
}
"""


@pytest.mark.slow
def test_compiling_dit_xl2_peaks_under_1_3_times_its_weights(tmp_path: Path):
    import diffusers

    model = diffusers.DiTTransformer2DModel(out_channels=8)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "dit", max_shard_size="1GB")
    del model
    (tmp_path / "rules.graft").write_text(RULES)
    word = f"diffusers:DiTTransformer2DModel@{tmp_path}/dit"
    given = [str(tmp_path / "rules.graft"), word, str(tmp_path / "build")]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"{size:,} bytes of weights, compiled at a peak of {peak / size:.2f} times that")
    assert peak < 1.3 * size
