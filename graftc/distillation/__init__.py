"""Training of a student: targets as data, capture of the teacher's activations, stage 1 and stage 2.

Reads a build (`targets.yaml`, teacher, student) and writes runs under `DIR/runs/ID`. Prints
nothing: progress goes to a callback, everything else to the run's log. Knows nothing of `.graft`
files.
"""

from graftc.distillation.cuts import capture_graph, extract
from graftc.distillation.data import open_data
from graftc.distillation.finetune import UNTRAINED, finetune, plan_finetune
from graftc.distillation.run import Progress, RunResult, SiteResult, finished, latest, runs
from graftc.distillation.sources import call_data
from graftc.distillation.stage1 import distill, plan_distill
from graftc.distillation.stage2 import Finetuned, finetune_module
from graftc.distillation.targets import Targets
from graftc.distillation.targets_file import from_dict, load_targets, save_targets, to_dict

__all__ = [
    "UNTRAINED",
    "Finetuned",
    "Progress",
    "RunResult",
    "SiteResult",
    "Targets",
    "call_data",
    "capture_graph",
    "distill",
    "extract",
    "finetune",
    "finetune_module",
    "finished",
    "from_dict",
    "latest",
    "load_targets",
    "open_data",
    "plan_distill",
    "plan_finetune",
    "runs",
    "save_targets",
    "to_dict",
]
