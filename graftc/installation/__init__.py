"""The student back where its original is used: in a diffusers pipeline, a transformers model, a training script.

Knows builds and packages; nothing of rules. `install` puts a build into a pipeline or a model,
`from_pretrained` loads what `save_pretrained` of an installed model wrote.
"""

from graftc.installation.install import Installed, from_pretrained, install

__all__ = ["Installed", "from_pretrained", "install"]
