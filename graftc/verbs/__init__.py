"""The verbs: the command line's, as functions. Each takes words or values and returns values."""

from graftc.environment import doctor
from graftc.language.check import check
from graftc.loading import load_data
from graftc.verbs.delivery import bench, export, report, verify
from graftc.verbs.editing import compile, explain, inspect, plan
from graftc.verbs.files import format_files, serve_editor, test_files
from graftc.verbs.training import (
    assemble,
    check_distill,
    distill,
    export_targets,
    finetune,
    load_targets,
    plan_distill,
    plan_finetune,
)

__all__ = [
    "assemble", "bench", "check", "check_distill", "compile", "distill", "doctor", "explain", "export", "export_targets", "finetune", "format_files", "inspect", "load_data", "load_targets", "plan", "plan_distill", "plan_finetune", "report", "serve_editor", "test_files", "verify",
]  # fmt: skip
