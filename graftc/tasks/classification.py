"""Classification of images, or of anything with one label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prepared, divergence, entry, primary


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of one label a sample.

    A raw sample holds `input_key` [B, …] and `label_key` [B] int64; the model is called with `input_name` and returns logits
    [B, K]. Defaults fit timm (`x`); for transformers' ViT set `input_name="pixel_values"`.

    >>> task = Classification()
    >>> prepared = task.prepare({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])}, torch.Generator())
    >>> task.metrics(torch.eye(2), prepared)["accuracy"]
    1.0
    """

    input_name: str = "x"
    input_key: str = "image"
    label_key: str = "label"
    smoothing: float = 0.0

    def prepare(self, sample: Mapping[str, Tensor], generator: torch.Generator) -> Prepared:
        """The target is `label` [B]. Draws nothing from `generator`."""
        inputs = {self.input_name: entry(sample, self.input_key, "classification")}
        return Prepared(inputs, {"label": entry(sample, self.label_key, "classification")})

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        """Mean cross-entropy in nats, with label smoothing if set."""
        return F.cross_entropy(
            primary(outputs).float(), prepared.targets["label"], label_smoothing=self.smoothing
        )

    def imitate(self, outputs: Any, wanted: Any, prepared: Prepared) -> Tensor:
        """Mean KL of the teacher's distribution over labels from the model's."""
        return divergence(primary(outputs), primary(wanted))

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        """`loss` (smoothed as in training) and `accuracy`."""
        hits = primary(outputs).argmax(-1) == prepared.targets["label"]
        return {"loss": self.loss(outputs, prepared).item(), "accuracy": hits.float().mean().item()}

    def sample(
        self, model: Callable[..., Any], *, count: int, generator: torch.Generator, **options: Any
    ) -> Tensor:
        """Nothing to draw from a classifier: with the option `inputs` [N, …], the predicted labels of its first `count`.

        Raises ValueError without it.
        """
        inputs = options.pop("inputs", None)
        if options or not isinstance(inputs, Tensor):
            raise ValueError(
                "a classifier generates nothing: sample() takes only inputs=[N, …] and returns their predicted labels"
            )
        with torch.inference_mode():
            return primary(model(**{self.input_name: inputs[:count]})).argmax(-1).clone()
