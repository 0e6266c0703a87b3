"""Next-token prediction, what decoder-only language models are trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prepared, divergence, entry, primary


@dataclass(frozen=True)
class CausalLM:
    """Cross-entropy of each token given those before it.

    A raw sample holds `tokens_key` [B, L] int64 and, where sequences are padded, `mask_key` [B, L] with 1 on real tokens. The
    model is called with `tokens_name` (and `mask_name`, when the sample has a mask) and returns logits [B, L, V]; the shift by one
    is done here. `ignore` marks targets that count for nothing, as in `torch.nn.functional.cross_entropy`.

    >>> task = CausalLM()
    >>> prepared = task.prepare({"input_ids": torch.tensor([[1, 2, 3]])}, torch.Generator())
    >>> prepared.targets["labels"]
    tensor([[   2,    3, -100]])
    >>> round(task.loss(torch.zeros(1, 3, 8), prepared).exp().item(), 4)
    8.0
    """

    tokens_name: str = "input_ids"
    mask_name: str = "attention_mask"
    tokens_key: str = "input_ids"
    mask_key: str = "attention_mask"
    labels_key: str = "labels"
    ignore: int = -100

    def prepare(self, sample: Mapping[str, Tensor], generator: torch.Generator) -> Prepared:
        """Targets are `labels` [B, L], already shifted left; the sample's own `labels`, unshifted, are used if it has some.

        Draws nothing from `generator`.
        """
        tokens = entry(sample, self.tokens_key, "causal_lm")
        inputs, mask = {self.tokens_name: tokens}, sample.get(self.mask_key)
        labels = sample.get(self.labels_key, tokens)
        if mask is not None:
            inputs[self.mask_name] = mask
            labels = labels.masked_fill(mask == 0, self.ignore)
        end = torch.full_like(labels[:, :1], self.ignore)
        return Prepared(inputs, {"labels": torch.cat([labels[:, 1:], end], dim=1)})

    def loss(self, outputs: Any, prepared: Prepared) -> Tensor:
        """Mean cross-entropy in nats a token, over the tokens that count."""
        logits, labels = primary(outputs), prepared.targets["labels"]
        if logits.shape[:2] != labels.shape:
            raise ValueError(
                f"causal_lm wants logits [B, L, V] for {tuple(labels.shape)} tokens, the model gave {tuple(logits.shape)}"
            )
        return F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=self.ignore
        )

    def weight(self, prepared: Prepared) -> int:
        """How many tokens the means of `loss` and `imitate` are over."""
        return int((prepared.targets["labels"] != self.ignore).sum())

    def imitate(self, outputs: Any, wanted: Any, prepared: Prepared) -> Tensor:
        """Mean KL of the teacher's next-token distribution from the model's, over the tokens that count."""
        counted = prepared.targets["labels"] != self.ignore
        return divergence(primary(outputs), primary(wanted), counted)

    def metrics(self, outputs: Any, prepared: Prepared) -> dict[str, float]:
        """`loss` in nats, `perplexity`, and `accuracy` of the most likely token."""
        logits, labels = primary(outputs), prepared.targets["labels"]
        loss, counted = self.loss(outputs, prepared), labels != self.ignore
        correct = (logits.argmax(-1) == labels) & counted
        return {
            "loss": loss.item(),
            "perplexity": loss.exp().item(),
            "accuracy": correct.sum().item() / max(int(counted.sum()), 1),
        }

    def sample(
        self, model: Callable[..., Any], *, count: int, generator: torch.Generator, **options: Any
    ) -> Tensor:
        """Continue `prompt` to `length` new tokens, `count` times: [count, P + length] int64.

        Options: `prompt` [P] or [count, P] int64 (required), `length` (default 32), `temperature` (default 1.0; 0 is greedy). Runs the
        whole prefix each step and uses no cache: right for any model, fast for none. `pad_to`: tokens that the model takes, no more
        and no fewer (one captured at a fixed length); what is still to come is 0, which a causal model does not see. `masked`: the
        model takes a mask too, of ones.
        """
        return self._continue(model, count, generator, **options)

    def prompts(self, samples: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options of `sample` that continue the first half of each of `samples`, for previews while a model trains."""
        tokens = entry(samples, self.tokens_key, "causal_lm")
        length = tokens.shape[1]
        half = max(1, length // 2)
        return {
            "prompt": tokens[:, :half],
            "length": length - half,
            "pad_to": length,
            "masked": self.mask_key in samples,
        }

    def _continue(
        self,
        model: Callable[..., Any],
        count: int,
        generator: torch.Generator,
        *,
        prompt: Tensor,
        length: int = 32,
        temperature: float = 1.0,
        pad_to: int | None = None,
        masked: bool = False,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        tokens = (prompt.expand(count, -1) if prompt.ndim == 1 else prompt).to(device)
        if len(tokens) != count:
            raise ValueError(f"{count} samples need {count} prompts, or one, not {len(tokens)}")
        with torch.inference_mode():
            for _ in range(length):
                at, given = tokens.shape[1] - 1, tokens
                if pad_to is not None:
                    given = F.pad(tokens, (0, pad_to - tokens.shape[1]))
                inputs = {self.tokens_name: given}
                if masked:
                    inputs[self.mask_name] = torch.ones_like(given)
                logits = primary(model(**inputs))[:, at].float().cpu()
                if temperature == 0:
                    following = logits.argmax(-1, keepdim=True)
                else:
                    following = torch.multinomial(
                        (logits / temperature).softmax(-1), 1, generator=generator
                    )
                tokens = torch.cat([tokens, following.to(tokens)], dim=1)
        return tokens.clone()
