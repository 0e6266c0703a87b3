"""The Python file that holds a build's targets for Model-Optimizer, as a template."""

TEXT = '''"""Layer-wise distillation of a graftc build with NVIDIA Model-Optimizer (modelopt.torch.distill).

    python THIS_FILE DATA [STEPS]        # DATA: file.py:function, as for `graftc distill`

Written by `graftc targets BUILD --to modelopt`, for nvidia-modelopt 0.47. `config(teacher)` is the config of its
mode `{mode}`; the loop below is an example, and yours to change. The weights go to `distilled.safetensors`.

{differs}"""

import sys
from itertools import islice
from pathlib import Path

import modelopt.torch.distill as mtd
import torch
import torch.nn.functional as F
from torch.nn.modules.loss import _Loss

BUILD = {build!r}
# (module of the student, module of the teacher) -> settings of the loss between their outputs
SITES = {{
{sites}
}}
# prefixes of the student's parameters that train; all others stay as they are
TRAINABLE = {trainable}


class SiteLoss(_Loss):
    """The site's regression loss times its weight, in units of the batch's target: a prediction of zero costs 1."""

    def __init__(self, kind, weight, delta, normalise, mask_above):
        super().__init__()
        self.kind, self.weight, self.delta = kind, weight, delta
        self.normalise, self.mask_above = normalise, mask_above

    def forward(self, output, target):
        output, target = joined(output).float(), joined(target).float()
        if self.kind == "auto":
            self.kind = kind_for(target)
        if self.mask_above is not None:
            kept = target.abs() <= self.mask_above * target.square().mean().sqrt()
            output, target = output[kept], target[kept]
        mean, energy = target.abs().mean(), target.square().mean()
        if self.kind == "l1":
            loss, zero = F.l1_loss(output, target), mean
        elif self.kind == "l2":
            loss, zero = F.mse_loss(output, target), energy
        else:
            unit = energy.sqrt() if self.normalise else 1.0
            loss, size = F.huber_loss(output / unit, target / unit, delta=self.delta), mean / unit
            near = 0.5 * size**2
            zero = torch.where(size <= self.delta, near, self.delta * (size - 0.5 * self.delta))
        return self.weight * (loss / zero if self.normalise else loss)


def joined(value):
    """What a module returns as one tensor: the streams of a joint attention side by side."""
    if isinstance(value, (tuple, list)):
        return torch.cat([part.flatten(1) for part in value], dim=1)
    return value


def kind_for(target):
    """The loss that suits the tails of the target, by its kurtosis (docs/targets.md, "Loss")."""
    centred = target.double() - target.double().mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square()
    return "l2" if kurtosis <= 3.30 else "l1" if kurtosis >= 4.53 else "huber"


class SumOfSites(mtd.DistillationLossBalancer):
    """Each site has parameters of its own, so the sum trains each as if it were alone."""

    def forward(self, loss):
        return sum(loss.values())


def config(teacher):
    """The config of the mode `{mode}`."""
    criterion = {{pair: SiteLoss(**said) for pair, said in SITES.items()}}
    return {{"teacher_model": teacher, "criterion": criterion, "loss_balancer": SumOfSites()}}


def convert(student, teacher):
    """The student as Model-Optimizer trains it: `model(**inputs)`, then `model.compute_kd_loss()`."""
    learned = {{n for n, p in student.named_parameters() if p.requires_grad and is_trainable(n)}}
    model = mtd.convert(student, mode=[("{mode}", config(teacher))])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned)
    return model


def is_trainable(name):
    return any(p in ("", name) or name.startswith(p + ".") for p in TRAINABLE)


def train(data, steps=200, batch=32, lr=1e-3, task=None):
    import graftc

    torch.manual_seed(0)
    work = graftc.load_targets(BUILD, task=task)  # teacher and student as modules, inputs as the task draws them
    work.solve(data)  # first weights that are fitted to the teacher's activations
    model = convert(work.student, work.teacher)
    model.train()  # modelopt's returns nothing
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr)
    for step, inputs in enumerate(islice(work.batches(data, batch=batch), steps)):
        model(**inputs)
        loss = model.compute_kd_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step + 1 == steps:
            print(step, round(loss.item(), 4))
    return mtd.export(model).eval()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    import graftc
    from safetensors.torch import save_model

    student = train(graftc.load_data(sys.argv[1]), *map(int, sys.argv[2:3]))
    save_model(student, str(Path(BUILD) / "distilled.safetensors"))
'''
