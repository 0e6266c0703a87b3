"""graftc: a language and a compiler that edit pretrained transformers."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(["inspect", "check", "plan", "compile", "distill", "finetune"], "verbs"),
    **dict.fromkeys(["explain", "export", "verify", "doctor", "report", "test_files"], "verbs"),
    **dict.fromkeys(["load_targets", "load_data", "check_distill", "plan_distill"], "verbs"),
    **dict.fromkeys(["plan_finetune", "export_targets"], "verbs"),
    **dict.fromkeys(["install", "from_pretrained"], "installation"),
    "cached": "distillation.shards",
    "Model": "program.model",
    "GraftError": "diagnostics",
}
__all__ = ["__version__", *_WHERE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"graftc.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'graftc' has no attribute {name!r}")
