"""`distill_example.py`: stage 1 as a loop of the user's own, written into every build that has sites."""

EXAMPLE = '''"""Stage 1 of this build as a loop of your own: one teacher pass a step feeds every site and candidate.

    python distill_example.py DATA [STEPS]        # DATA: file.py:function, as for `graftc distill`

It needs torch and graftc, of which only `graftc.load_targets`; docs/targets.md says what that gives. The loop
is yours to change: it has one AdamW, no schedule, no resume. The weights go to `distilled.safetensors`.
"""

import sys
from itertools import islice
from pathlib import Path

import graftc
import torch
from safetensors.torch import save_model

BUILD = Path(__file__).parent


def train(data, steps=200, batch=32, lr=1e-3):
    torch.manual_seed(0)
    work = graftc.load_targets(BUILD)
    for names in work.generations():  # sites inside others come first
        work.solve(data, names)  # first weights that are fitted to the teacher's activations
        capture = work.capture(names)  # the teacher, cut off after the last of these sites
        students = {name: work.students[name] for name in names}
        weights = {name: student.trainable() for name, student in students.items()}
        weights = {name: found for name, found in weights.items() if found}
        if not weights:
            continue
        optimiser = torch.optim.AdamW([p for found in weights.values() for p in found], lr=lr)
        for step, inputs in enumerate(islice(work.batches(data, batch=batch), steps)):
            values = capture(**inputs)  # site -> {"x": ..., "output": ...}
            losses = {n: work.losses[n](students[n](values[n]), values[n]) for n in weights}
            optimiser.zero_grad()
            sum(losses.values()).backward()
            for found in weights.values():
                torch.nn.utils.clip_grad_norm_(found, 1.0)
            optimiser.step()
            if step % 50 == 0 or step + 1 == steps:
                print(step, {name: round(loss.item(), 4) for name, loss in losses.items()})
    return work


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    work = train(graftc.load_data(sys.argv[1]), *map(int, sys.argv[2:3]))
    student = work.merge()  # work.merge({"SITE": 1}) puts a candidate of `one of` in place
    save_model(student, str(BUILD / "distilled.safetensors"))
'''
