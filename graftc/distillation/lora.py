"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through peft, merged at the end."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from graftc.diagnostics import Diagnostic, NotRunError, fail
from graftc.distillation.targets import Lora


def inject(module: nn.Module, lora: Lora) -> list[str]:
    """Put an adapter on every linear layer, in place; returns the names of the adapters' parameters.

    Raises NotRunError (G548) where peft is not installed, GraftError where there is no linear layer.
    """
    try:
        import peft
    except ImportError as error:
        text = "LoRA needs peft, which is not installed"
        raise NotRunError(Diagnostic("G548", text, help="pip install 'graftc[train]'")) from error
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if not linear:
        fail("G549", "LoRA finds no linear layer in the model", site=type(module).__name__)
    alpha: Any = lora.alpha or lora.rank  # peft divides by the rank; it takes fractions too
    # A pattern of full names: peft would take a plain name for the end of any other.
    names = "|".join(re.escape(name) for name in linear)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=alpha, target_modules=f"({names})", lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, module)
    return [name for name, _ in module.named_parameters() if ".lora_" in name]


def save(module: nn.Module, folder: Path) -> None:
    """Write the adapters as peft keeps them: `peft.PeftModel.from_pretrained(model, folder)` loads them.

    `model` is the module as it was before `inject`. Raises GraftError (G550) where it cannot be written.
    """
    import peft

    config: Any = next(iter(vars(module)["peft_config"].values()))
    state: dict[str, Any] = peft.get_peft_model_state_dict(module)
    tensors = {
        f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in state.items()
    }
    partial = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(str(partial))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        fail("G550", f"cannot write `{folder.name}`: {error}", site=str(folder),
             help="free some space, then resume")  # fmt: skip


def merge(module: nn.Module) -> None:
    """Add the adapters to the weights and remove them: the module has its plain names again."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "get_base_layer") and hasattr(layer, "merge"):
            adapted: Any = layer
            adapted.merge()
            module.set_submodule(name, adapted.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(module, attribute):
            delattr(module, attribute)
