"""A small digit classifier: its 32 penultimate features are the space in which this example measures Fréchet distance.

Trained on the 1,500 training images, checked on the 297 held out. Train it again (about half a minute on one core) with

    python examples/digits/classifier.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
FEATURES = 32


class Classifier(nn.Module):
    """Digit [B, 1, 8, 8] in [-1, 1] -> logits [B, 10].

    >>> Classifier().features(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 32])
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.reduce = nn.Linear(2 * width * 16, FEATURES)
        # Unit variance for each feature over real digits: no direction rules the distance by its scale alone.
        self.norm = nn.BatchNorm1d(FEATURES, affine=False)
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate features [B, 32]. Taken before the activation, so that no unit is dead and the covariance has full rank."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return self.norm(self.reduce(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.features(x)))


def classifier() -> Classifier:
    """The trained classifier, in evaluation mode."""
    from safetensors.torch import load_file

    model = Classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


def accuracy(model: Classifier, batch: dict[str, Tensor]) -> float:
    """Share of `batch` classified as labelled."""
    with torch.inference_mode():
        return (model(batch["latent"]).argmax(1) == batch["label"]).float().mean().item()


def train(epochs: int = 60, seed: int = 0) -> Classifier:
    """Train on the 1,500 training images, with shifts of up to a pixel and a little noise for augmentation."""
    from data import images

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, model = images().batch(), Classifier()
    count, size = len(batch["label"]), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=epochs * (count // size)
    )
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            rows = order[start : start + size]
            x = batch["latent"][rows]
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            x = F.pad(x, (1, 1, 1, 1), value=-1.0)[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
            loss = F.cross_entropy(model(x), batch["label"][rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    # The stored statistics are those of the clean training images, not of the augmented stream.
    model.norm.momentum = None
    model.norm.reset_running_stats()
    with torch.no_grad():
        model(batch["latent"])
    return model.eval()


def main() -> None:
    from data import held_out, images
    from safetensors.torch import save_file

    model = train()
    save_file(model.state_dict(), WEIGHTS)
    print(
        f"accuracy: train {accuracy(model, images().batch()):.4f}, held out {accuracy(model, held_out().batch()):.4f}"
    )


if __name__ == "__main__":
    main()
