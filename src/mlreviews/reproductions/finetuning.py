"""What experiments with fine-tuning share: a model of Python source learns the prose of its docstrings.

The shipped byte-level models were trained on the source code of Python's standard library. What they are to learn is
the English in its docstrings; what they may forget is source code. Both are measured in bits per byte on files that
none of the training has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlreviews.datasets import python_prose, python_source
from mlreviews.models import TinyLM, load_pretrained
from mlreviews.reproductions.training import bits_per_byte, next_token_loss, training

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mlreviews.datasets import TextSplit
    from mlreviews.reproductions.protocol import Settings

__all__ = ["MATRICES", "FineTuning", "fine_tuning"]

# all linear layers of the blocks
MATRICES = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj"


@dataclass(frozen=True)
class FineTuning:
    """The task at one size.

    Attributes:
        name: of the model, for `load_pretrained`.
        device: where it runs.
        updates: of a fine-tuning.
        batch: windows in an update.
        length: bytes of a window.
        tested: bytes of each measurement.
        seeds: of fine-tunings that are compared.
    """

    name: str
    device: str
    updates: int
    batch: int
    length: int
    tested: int
    seeds: int

    def model(self) -> TinyLM:
        """The pre-trained model, in training mode."""
        return load_pretrained(self.name).to(self.device).train()

    def train(
        self,
        model: nn.Module,
        rate: float,
        generator: torch.Generator,
        *,
        split: TextSplit | None = None,
        groups: list[dict[str, Any]] | None = None,
    ) -> list[float]:
        """Fine-tunes what isn't frozen with AdamW.

        Args:
            model: from ids to logits and more.
            rate: the highest step size.
            generator: draws the windows.
            split: the text; None is the prose.
            groups: parameters with their highest step sizes, in the place of the rate.

        Returns:
            The loss of each update, in bits per byte.
        """
        batches = (split or python_prose().train).batches(self.length, self.batch, generator)
        steps = training(
            model, lambda: next_token_loss(model, next(batches).to(self.device)), self.updates, rate, groups=groups
        )
        return [loss / math.log(2) for _, loss in steps]

    def prose(self, model: nn.Module) -> float:
        """Bits per byte on unseen prose: what was learned."""
        return self.bits(model, python_prose().validation)

    def source(self, model: nn.Module) -> float:
        """Bits per byte on unseen source code: what was known before."""
        return self.bits(model, python_source().validation)

    def bits(self, model: nn.Module, split: TextSplit) -> float:
        """Bits per byte over the first bytes of a split, in evaluation mode.

        Args:
            model: from ids to logits and more.
            split: the text.
        """
        mode = model.training
        bits = bits_per_byte(model.eval(), split, 128, self.tested)
        model.train(mode)
        return bits


def fine_tuning(settings: Settings) -> FineTuning:
    """The model of 0.3 million parameters and a few seconds a seed, or that of 3.3 million and 400 updates."""
    if settings.full:
        return FineTuning("python-target", settings.device, 400, 16, 128, 262_144, 5)
    return FineTuning("python-draft", settings.device, 30, 8, 96, 8_192, 3)
