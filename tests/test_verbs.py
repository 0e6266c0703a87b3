"""The public API: every verb is a function, whatever was imported before."""

from __future__ import annotations

import importlib

import pytest

import graftc

VERBS = ["inspect", "check", "plan", "compile", "distill", "finetune", "export", "verify", "doctor"]


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_not_hidden_by_a_module(name: str) -> None:
    for module in ("verbs", "compiler", "distillation", "emit", "environment", "targets"):
        importlib.import_module(f"graftc.{module}")
    assert callable(getattr(graftc, name))
