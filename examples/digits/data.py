"""The digits: 1,797 scans of 8x8 pixels that scikit-learn carries in its wheel (UCI, Alpaydin & Kaynak 1998).

Real images, real labels, no download. A pixel is one of 17 levels, 0..16, stored here as [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

LEVELS = 17
CLASSES = 10
SHAPE = (1, 8, 8)
HELD_OUT = 297
_SPLIT_SEED = 20250605


@dataclass(frozen=True)
class Digits:
    """A sized, indexable data set of `{"latent": [1, 8, 8] float32, "label": [] int64}`.

    >>> len(Digits("train")), len(Digits("held_out")), len(Digits("all"))
    (1500, 297, 1797)
    >>> Digits("train")[0]["latent"].shape
    torch.Size([1, 8, 8])
    """

    part: Literal["train", "held_out", "all"] = "all"

    @property
    def rows(self) -> Tensor:
        """Row numbers in scikit-learn's order, `[len(self)]` int64."""
        train, held_out = split()
        if self.part == "train":
            return train
        return held_out if self.part == "held_out" else torch.arange(len(train) + len(held_out))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        latent, label = _tensors()
        row = int(self.rows[index])
        return {"latent": latent[row].clone(), "label": label[row].clone()}

    def batch(self, indices: Sequence[int] | Tensor | None = None) -> dict[str, Tensor]:
        """Stacked samples: `latent` [B, 1, 8, 8] and `label` [B]; every sample when `indices` is None."""
        latent, label = _tensors()
        rows = self.rows if indices is None else self.rows[torch.as_tensor(indices)]
        return {"latent": latent[rows], "label": label[rows]}


def images() -> Digits:
    """The DATA function of this example (`graftc … -d examples/digits/data.py:images`): the 1,500 training images.

    The teacher and every student see these; the 297 of `held_out()` validate distillation and are trained on by nothing.

    >>> sorted(images()[0])
    ['label', 'latent']
    """
    return Digits("train")


def held_out() -> Digits:
    """The 297 images that neither the teacher, nor a student, nor the feature classifier was trained on."""
    return Digits("held_out")


@cache
def split() -> tuple[Tensor, Tensor]:
    """Row numbers (train [1500], held out [297]): a seeded permutation, the last 297 held out."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return order[:-HELD_OUT], order[-HELD_OUT:]


@cache
def _tensors() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    latent = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return latent, torch.as_tensor(digits.target, dtype=torch.int64)
