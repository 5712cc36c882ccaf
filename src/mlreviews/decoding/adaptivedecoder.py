r"""AdaptiveDecoder: a small network chooses the temperature for each token or text, trained from preferences.

Paper: Adaptive Decoding via Latent Preference Optimization (arXiv:2411.09661).

Facts want a low temperature, stories a high one. A network on the last hidden state gives a distribution over a few
temperatures; the likeliest is used, for each token or once for the whole answer. It is trained on pairs of answers that
were drawn at temperatures of its own choice, the better and the worse of several, by a loss like DPO's in which the
choice of a temperature counts as a token.

Equation:
    $$ p(\tau_k \mid h) = \mathrm{softmax}_k\, \mathrm{MLP}(h), \qquad
       p(y \mid \tau) = \mathrm{softmax}(z / \tau), \quad \tau = \tau_{\arg\max_k p(\tau_k \mid h)} \tag{1} $$
    $$ L_{\tau} = -\log \sigma\big(\beta \log p(\tau^c) - \beta \log p(\tau^r)\big) \tag{2} $$
    $$ L_{\tau, y} = -\log \sigma\Big(\beta \log p(\tau^c) - \beta \log p(\tau^r)
       + \beta \log \tfrac{p(y^c)}{p_{\mathrm{ref}}(y^c)}
       - \beta \log \tfrac{p(y^r)}{p_{\mathrm{ref}}(y^r)}\Big) \tag{3} $$
    $$ L_{y} = -\log \sigma\Big(\beta \log \tfrac{p'(y^c)}{p'_{\mathrm{ref}}(y^c)}
       - \beta \log \tfrac{p'(y^r)}{p'_{\mathrm{ref}}(y^r)}\Big), \qquad
       p'(y_t) = \sum_k p(\tau_k \mid h_t)\, p(y_t \mid \tau_k) \tag{4} $$

Symbols:
    h: [..., d_model], last hidden state, of the last token of the prompt or of each token.
    z: [..., vocab], logits.
    tau: temperatures; 0 is the most likely token.
    log p: sums over the tokens of an answer, [batch]; c is the preferred one, r the other.

Defaults:
    temperatures: 0, 0.2, 0.4, 0.6, 0.8, 1 (section 4.3; 1.2 as well for majority votes, table 3).
    hidden: d_model units (ours), in three layers with SiLU (section 3).
    beta: 0.1 (ours).

Deviations:
    1. Ties between the best and the worst answer of a prompt give no pair.
    2. The temperature is the likeliest one; drawn from the distribution it makes no difference (table 5). Drawn, the
       law of a token is the mixture of equation (4), `mixture_log_probs`.

Reduces to:
    dpo: equation (4) with temperature 1 alone, and equation (3) where both answers have the same temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_finite, check_number
from mlreviews.common.layers import linear
from mlreviews.models import CausalLM, LMOutput, WrappedLM

__all__ = [
    "TEMPERATURES",
    "AdaptiveDecoder",
    "AdaptiveTemperatureLM",
    "best_and_worst",
    "lpo_joint_loss",
    "lpo_marginal_loss",
    "lpo_temperature_loss",
    "mixture_log_probs",
    "tempered_log_probs",
]

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def tempered_log_probs(
    logits: Float[Tensor, "*batch vocab"], temperature: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities at a temperature for each distribution; 0 is the first of the most likely tokens alone.

    Args:
        logits: [..., vocab].
        temperature: [...], 0 or more.
    """
    cold = temperature[..., None] == 0
    warm = (logits / temperature[..., None].masked_fill(cold, 1.0)).log_softmax(-1)
    best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(-1, keepdim=True), True)
    return torch.where(cold, torch.zeros_like(warm).masked_fill(~best, -math.inf), warm)


def mixture_log_probs(
    logits: Float[Tensor, "*batch vocab"],
    log_choice: Float[Tensor, "*batch temperatures"],
    temperatures: Float[Tensor, " temperatures"],
) -> Float[Tensor, "*batch vocab"]:
    """Equation (4): the law of a token whose temperature is drawn.

    Args:
        logits: [..., vocab].
        log_choice: [..., temperatures], log-probabilities of the temperatures.
        temperatures: [temperatures].
    """
    each = [
        choice[..., None] + tempered_log_probs(logits, temperature.expand(logits.shape[:-1]))
        for choice, temperature in zip(log_choice.unbind(-1), temperatures.to(logits), strict=True)
    ]
    return torch.stack(each).logsumexp(0)


def lpo_temperature_loss(
    chosen_tau: Float[Tensor, " batch"], rejected_tau: Float[Tensor, " batch"], *, beta: float = 0.1
) -> Float[Tensor, " batch"]:
    """Equation (2), of each pair; the language model is left alone.

    Args:
        chosen_tau: [batch], log-probability of the temperatures of the preferred answer, summed over its tokens.
        rejected_tau: [batch], of the other one.
        beta: weight of the preference, above 0.
    """
    return _preference(chosen_tau - rejected_tau, beta)


def lpo_joint_loss(
    chosen_tau: Float[Tensor, " batch"],
    rejected_tau: Float[Tensor, " batch"],
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    ref_chosen: Float[Tensor, " batch"],
    ref_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " batch"]:
    """Equation (3), of each pair: temperatures are tokens among the others. They have no reference.

    Args:
        chosen_tau: [batch], log-probability of the temperatures of the preferred answer, summed over its tokens.
        rejected_tau: [batch], of the other one.
        chosen: [batch], log-probability of the preferred answer's tokens at its temperatures.
        rejected: [batch], of the other one.
        ref_chosen: [batch], of the preferred answer under the reference model.
        ref_rejected: [batch], of the other one.
        beta: weight of the preference, above 0.
    """
    tokens = (chosen - ref_chosen) - (rejected - ref_rejected)
    return _preference(chosen_tau - rejected_tau + tokens, beta)


def lpo_marginal_loss(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    ref_chosen: Float[Tensor, " batch"],
    ref_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " batch"]:
    """Equation (4), of each pair: log-probabilities are sums of those of `mixture_log_probs`.

    Args:
        chosen: [batch], of the preferred answer.
        rejected: [batch], of the other one.
        ref_chosen: [batch], of the preferred answer under the reference.
        ref_rejected: [batch], of the other one.
        beta: weight of the preference, above 0.
    """
    return _preference((chosen - ref_chosen) - (rejected - ref_rejected), beta)


def _preference(margin: Tensor, beta: float) -> Tensor:
    check_number("beta", beta, above=0.0)
    return -nn.functional.logsigmoid(beta * margin)


def best_and_worst(
    scores: Float[Tensor, "prompts samples"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """The pairs to train on: of each prompt the answer with the highest and the one with the lowest score.

    Args:
        scores: [prompts, samples], of each answer.

    Returns:
        ``(prompt, chosen, rejected)``, [pairs] each; prompts all of whose answers score the same are left out.

    Raises:
        ValueError: fewer than two answers, or NaN.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected [prompts, 2 samples or more], got shape {tuple(scores.shape)}")
    check_finite("scores", scores)
    best, worst = scores.max(1), scores.min(1)
    prompt = (best.values > worst.values).nonzero()[:, 0]
    return prompt, best.indices[prompt], worst.indices[prompt]


class AdaptiveDecoder(nn.Module):
    """From hidden states to log-probabilities of temperatures.

    Args:
        d_model: size of a hidden state.
        temperatures: to choose from, 0 or more each.
        hidden: units of the two inner layers; None is `d_model`.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: no temperatures, a negative one, or one twice.
    """

    temperatures: Tensor

    def __init__(
        self,
        d_model: int,
        temperatures: Sequence[float] = TEMPERATURES,
        *,
        hidden: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        hidden = d_model if hidden is None else hidden
        check_count("hidden", hidden)
        for temperature in temperatures:
            check_number("temperatures", temperature, least=0.0)
        if not temperatures or len(set(temperatures)) < len(temperatures):
            raise ValueError(f"temperatures: expected different ones, got {list(temperatures)}")
        self.register_buffer("temperatures", torch.tensor(temperatures, dtype=torch.get_default_dtype()))
        self.layers = nn.ModuleList(
            linear(*sizes, generator=generator)
            for sizes in ((d_model, hidden), (hidden, hidden), (hidden, len(temperatures)))
        )

    def forward(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch temperatures"]:
        """Log-probabilities of the temperatures, [..., temperatures].

        Args:
            h: [..., d_model], last hidden states.
        """
        first, second, last = self.layers
        x = nn.functional.silu(second(nn.functional.silu(first(h))))
        return last(x).log_softmax(-1)


class _Cache(NamedTuple):
    """The model's cache, and the temperature that was chosen for each row; see `mlreviews.models.Cache`."""

    model: Any
    temperature: Tensor

    @property
    def length(self) -> int:
        """How many tokens the model has seen."""
        return int(self.model.length)

    def crop(self, length: int) -> _Cache:
        """The cache after the first `length` tokens."""
        return _Cache(self.model.crop(length), self.temperature)

    def rows(self, index: Tensor) -> _Cache:
        """The given rows of the batch."""
        return _Cache(self.model.rows(index), self.temperature[index])

    def keep(self, start: int, index: Tensor, mask: Tensor | None = None) -> _Cache:
        """The first `start` tokens, and of the others the given ones."""
        return _Cache(self.model.keep(start, index, mask), self.temperature)


class AdaptiveTemperatureLM(WrappedLM):
    """A causal language model whose logits are log-probabilities at the chosen temperatures; decoders take it so.

    ::

        adaptive = AdaptiveTemperatureLM(model, decoder)
        result = generate(adaptive, ids, 100, sampler=Sampler(temperature=1.0), generator=generator)

    Args:
        model: any `mlreviews.models.CausalLM`.
        decoder: chooses the temperatures.
        level: "token", for each token anew; "sequence", once, at the end of the prompt: the first call with no cache.

    Raises:
        ValueError: no such level.
    """

    def __init__(
        self, model: CausalLM, decoder: AdaptiveDecoder, level: Literal["token", "sequence"] = "token"
    ) -> None:
        if level not in ("token", "sequence"):
            raise ValueError(f"level: expected 'token' or 'sequence', got {level!r}")
        super().__init__(model)
        self.decoder, self.level = decoder, level

    def temperature(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """The likeliest temperature for each hidden state, equation (1)."""
        return self.decoder.temperatures[self.decoder(h).argmax(-1)]

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
        """Runs over the tokens that follow those of the cache; arguments as of `mlreviews.models.TinyLM.forward`."""
        before = None if cache is None else cache.model
        out = self.model(ids, before, mask=mask, positions=positions, tree=tree, hidden_states=True)
        assert out.hidden_states is not None
        last = out.hidden_states[-1]
        if self.level == "token":
            temperature = self.temperature(last)
            kept = temperature[:, -1]
        else:
            kept = self.temperature(last[:, -1]) if cache is None else cache.temperature
            temperature = kept[:, None].expand(ids.shape)
        logits = tempered_log_probs(out.logits, temperature)
        found: Any = _Cache(out.cache, kept)
        return LMOutput(logits, found, out.hidden_states if hidden_states else None)
