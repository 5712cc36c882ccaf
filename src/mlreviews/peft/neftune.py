r"""NEFTune: uniform noise on the token embeddings while a model is fine-tuned.

Paper: NEFTune: Noisy Embeddings Improve Instruction Finetuning (arXiv:2310.05914).

In training, every entry of the embedded sequence gets independent uniform noise; in evaluation, none. The noise is
scaled such that its Euclidean norm over a whole sequence has about the same size whatever the length and the width. It
is a regulariser: the model fits the wording of a small set of instructions less closely.

Equation:
    $$ x' = x + \frac{\alpha}{\sqrt{L d}}\, \epsilon, \qquad \epsilon_{tj} \sim U(-1, 1) \tag{1} $$
    $$ \mathbb{E}\, \lVert x' - x \rVert^2 = \frac{\alpha^2}{L d} \cdot \frac{L d}{3} = \frac{\alpha^2}{3} \tag{2} $$

Symbols:
    x: [batch, time, dim], the embedded tokens.
    L: the number of tokens of a sequence, padding not counted where a mask is given.
    d: dim, the width of the embedding.
    epsilon: [batch, time, dim], the noise.

Defaults:
    alpha: 5 (section 3; 5, 10 and 15 are tried there).

Deviations:
    1. Without a mask L is the padded length and padding gets noise as well, as in transformers' version; with one, L is
       each row's own length and padding stays as it is, as in the authors' code.
    2. The noise is drawn in float32 and rounded to the embeddings' dtype, so that half precision sees the same draws.

Reduces to:
    plain fine-tuning: alpha = 0, bit for bit.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlreviews.common.checks import check_number

__all__ = ["NEFTune", "neftune_noise"]


def neftune_noise(
    embeddings: Float[Tensor, "batch time dim"],
    alpha: float = 5.0,
    mask: Bool[Tensor, "batch time"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch time dim"]:
    """Embeddings with the noise of eq. (1).

    Args:
        embeddings: [batch, time, dim].
        alpha: size of the noise, at least 0.
        mask: [batch, time], False at padding; None is no padding.
        generator: draws the noise; None is the global one.

    Returns:
        [batch, time, dim] in the embeddings' dtype. The gradient is that of the embeddings themselves.

    Raises:
        ValueError: alpha is negative or not finite, an empty axis, or a mask of another shape.
    """
    check_number("alpha", alpha, least=0.0)
    if embeddings.ndim != 3 or embeddings.numel() == 0:
        got = tuple(embeddings.shape)
        raise ValueError(f"embeddings: expected [batch, time, dim] with no empty axis, got shape {got}")
    batch, time, dim = embeddings.shape
    if mask is not None and (mask.shape != (batch, time) or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected {[batch, time]} of bool, got shape {tuple(mask.shape)} of {mask.dtype}")
    if alpha == 0:
        return embeddings
    noise = torch.empty(embeddings.shape, device=embeddings.device).uniform_(-1, 1, generator=generator)
    if mask is None:
        scaled = noise * (alpha / (time * dim) ** 0.5)
    else:
        length = mask.sum(1).clamp(min=1)  # a row of nothing but padding gets no noise, and no division by zero
        scaled = noise * mask[..., None] * (alpha / (length * dim) ** 0.5)[:, None, None]
    return embeddings + scaled.to(embeddings.dtype)


class NEFTune:
    """Puts the noise on the output of an embedding layer, in training only, until it is detached.

    ::

        noise = NEFTune(model.embed_tokens, alpha=5.0, generator=generator)
        ...                     # train
        noise.detach()

    Args:
        embedding: the layer, from ids [batch, time] to vectors [batch, time, dim]. Attached at once.
        alpha: size of the noise.
        generator: draws the noise; None is the global one.

    Raises:
        ValueError: alpha is negative or not finite.
    """

    def __init__(self, embedding: nn.Module, alpha: float = 5.0, *, generator: torch.Generator | None = None) -> None:
        check_number("alpha", alpha, least=0.0)
        self.embedding = embedding
        self.alpha = alpha
        self.generator = generator
        self._handle: RemovableHandle | None = None
        self.attach()

    def attach(self) -> None:
        """Adds the hook; nothing happens when it is there already."""
        if self._handle is None:
            self._handle = self.embedding.register_forward_hook(self._hook)

    def detach(self) -> None:
        """Takes the hook away; nothing happens when it isn't there."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self, embedding: nn.Module, _: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
        # The layer's own mode decides: it follows model.train() and model.eval().
        return neftune_noise(vectors, self.alpha, generator=self.generator) if embedding.training else vectors
