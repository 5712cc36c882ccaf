r"""DoLa: the next token by the contrast between the last layer's distribution and an early layer's.

Paper: DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models (arXiv:2309.03883).

The head is put on hidden states of earlier layers, too. For each token the layer whose distribution is farthest from
the last one's is taken as premature, and what it says is subtracted in log space: what only the late layers know is
amplified. Tokens that the last layer finds very unlikely are left out. No training, no second model.

Equation:
    $$ q_j = \mathrm{softmax}(W\, \mathrm{norm}(h_j)), \qquad
       M = \arg\max_{j \in \mathcal{J}} \mathrm{JSD}(q_N \,\|\, q_j) \tag{1} $$
    $$ \mathcal{V} = \{ x : q_N(x) \ge \alpha \max_w q_N(w) \} \tag{2} $$
    $$ F(x) = \log \frac{q_N(x)}{q_M(x)} \ \text{ for } x \in \mathcal{V}, \qquad -\infty \text{ otherwise};
       \qquad p = \mathrm{softmax}(F) \tag{3} $$

Symbols:
    h_j: [batch, time, d_model], hidden state after block j; 0 is the embedding, N the last.
    J: the candidates for the premature layer, a bucket of the even-numbered layers.
    F: [batch, time, vocab], what the sampler takes as logits.

Defaults:
    alpha: 0.1 (section 2.3).
    layers: "high", the even layers of the last bucket; the paper chooses the bucket on validation data, the high one
        for TruthfulQA, the low one for the others (section 3.1).
    repetition_penalty: 1.2 (section 3.1), given as `Sampler(repetition_penalty=1.2)`.

Deviations:
    1. The last norm is applied to the early hidden states, as it is to the last one. The authors' code and
       transformers' leave it out, so that an early layer's logits have another scale.
    2. The premature layer is chosen for each row and token; the authors' code takes the mean divergence of the batch.
    3. With a tied head the embedding's own prediction is the token itself; layer 0 is then no candidate of a bucket,
       and neither is layer 1, which is odd. transformers does the same.

Reduces to:
    greedy decoding: alpha = 1, with the plain most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count, check_number
from mlreviews.models import CausalLM, LMOutput, WrappedLM

__all__ = ["DoLa", "candidate_layers", "contrast_logits", "dola_logits", "js_divergence"]


def js_divergence(
    log_p: Float[Tensor, "*batch vocab"], log_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence in nats, from 0 to ln 2.

    Args:
        log_p: [..., vocab], normalised; minus infinity where the probability is 0.
        log_q: likewise.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = [torch.where(x > -math.inf, x.exp() * (x - log_m), 0.0).sum(-1) for x in (log_p, log_q)]
    return ((terms[0] + terms[1]) / 2).clamp(0, math.log(2))  # rounding leaves the interval


def contrast_logits(
    final: Float[Tensor, "*batch vocab"], early: Float[Tensor, "*batch vocab"], alpha: float = 0.1
) -> Float[Tensor, "*batch vocab"]:
    """Equation (3) for a premature layer that is known.

    Args:
        final: [..., vocab], logits of the last layer.
        early: [..., vocab], logits of the premature layer.
        alpha: least probability of a token that is left in, as a part of the largest one; above 0, up to 1.

    Returns:
        [..., vocab], float32 at least; minus infinity for tokens that are left out.

    Raises:
        ValueError: alpha is out of range.
    """
    check_number("alpha", alpha, above=0.0)
    if alpha > 1:
        raise ValueError(f"alpha: expected at most 1, got {alpha}")
    log_final, log_early = _log_softmax(final), _log_softmax(early)
    least = log_final.amax(-1, keepdim=True) + math.log(alpha)
    return (log_final - log_early).masked_fill(log_final < least, -math.inf)


def dola_logits(
    final: Float[Tensor, "*batch vocab"], early: Float[Tensor, "layers *batch vocab"], alpha: float = 0.1
) -> tuple[Float[Tensor, "*batch vocab"], Int[Tensor, "*batch"]]:
    """Equations (1) to (3).

    Args:
        final: [..., vocab], logits of the last layer.
        early: [layers, ..., vocab], logits of the candidates.
        alpha: as of `contrast_logits`.

    Returns:
        ``(logits, chosen)``: [..., vocab], and [...], which of the candidates was taken.

    Raises:
        ValueError: no candidates, or alpha out of range.
    """
    if early.shape[0] == 0 or early.shape[1:] != final.shape:
        raise ValueError(f"early: expected [layers, *{list(final.shape)}] with a layer, got {list(early.shape)}")
    log_early = _log_softmax(early)
    chosen = js_divergence(_log_softmax(final).expand_as(log_early), log_early).argmax(0)
    index = chosen[None, ..., None].expand(1, *final.shape)
    return contrast_logits(final, log_early.gather(0, index)[0], alpha), chosen


def candidate_layers(layers: int, bucket: Literal["low", "high"], *, tied: bool = False) -> list[int]:
    """The even-numbered layers of the first or the last bucket; buckets have 20 layers at most, and there are two.

    Args:
        layers: blocks of the model; 0 is the embedding, and the last layer is no candidate.
        bucket: which.
        tied: whether the head is the embedding's matrix; then layer 0 is left out.

    Raises:
        ValueError: too few layers, or no such bucket.
    """
    check_count("layers", layers, least=2)
    if bucket not in ("low", "high"):
        raise ValueError(f"bucket: expected 'low' or 'high', got {bucket!r}")
    size = layers // max(2, math.ceil(layers / 20))
    first, end = (0, size) if bucket == "low" else (layers - size, layers)
    found = [layer for layer in range(first + first % 2, end, 2) if layer > 0 or not tied]
    if not found:
        raise ValueError(f"layers: {layers} leave no candidate in the {bucket} bucket; name the layers")
    return found


class DoLa(WrappedLM):
    """A causal language model whose logits are the contrast of a model's layers; decoders take it like any other.

    ::

        result = generate(DoLa(model), ids, 100, sampler=Sampler(repetition_penalty=1.2))

    Hidden states are those of the model, so that the head on the last one gives the logits without contrast.

    Args:
        model: any `mlreviews.models.CausalLM`.
        layers: the candidates, "low" or "high" (see `candidate_layers`) or their numbers; a single one is the paper's
            static variant.
        alpha: as of `contrast_logits`.

    Raises:
        ValueError: no layers, or alpha out of range.
    """

    def __init__(
        self, model: CausalLM, layers: Literal["low", "high"] | Sequence[int] = "high", *, alpha: float = 0.1
    ) -> None:
        contrast_logits(torch.zeros(1), torch.zeros(1), alpha)  # raises where it is out of range
        if not layers or (isinstance(layers, str) and layers not in ("low", "high")):
            raise ValueError(f"layers: expected 'low', 'high' or numbers of layers, got {layers!r}")
        super().__init__(model)
        self.layers, self.alpha = layers, alpha

    @torch.no_grad()
    def __call__(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Any = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        """Runs over the tokens that follow those of the cache; arguments as of `mlreviews.models.TinyLM.forward`.

        Raises:
            ValueError: a candidate that the model doesn't have, or its last layer.
        """
        out = self.model(ids, cache, mask=mask, positions=positions, tree=tree, hidden_states=True)
        assert out.hidden_states is not None
        early = self.early_logits(out.hidden_states)
        logits, _ = dola_logits(out.logits, early, self.alpha)
        return LMOutput(logits, out.cache, out.hidden_states if hidden_states else None)

    def early_logits(self, hidden_states: tuple[Tensor, ...]) -> Float[Tensor, "layers batch time vocab"]:
        """What the head says on each candidate's hidden states, [layers, batch, time, vocab].

        Args:
            hidden_states: of all layers, as the model returns them.

        Raises:
            ValueError: a candidate that the model doesn't have, or its last layer.
        """
        last = len(hidden_states) - 1
        layers = self.layers
        if isinstance(layers, str):
            layers = candidate_layers(last, layers, tied=_tied(self.model))
        if not all(0 <= layer < last for layer in layers):
            raise ValueError(f"layers: expected numbers from 0 to {last - 1}, before the last one, got {layers}")
        # all but the last state still have to pass the norm
        early: Tensor = self.lm_head(self.norm(torch.stack([hidden_states[layer] for layer in layers])))
        return early


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _tied(model: CausalLM) -> bool:
    return getattr(model.lm_head, "weight", None) is model.embed_tokens.weight
