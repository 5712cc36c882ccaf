r"""RSO: preference pairs drawn from the optimal policy, by rejection sampling from the fine-tuned one.

Paper: Statistical Rejection Sampling Improves Preference Optimization (arXiv:2309.06657).

The loss of DPO is the maximum likelihood of preferences between answers of the optimal policy, but its pairs come from
elsewhere. RSO trains a ranker on the given pairs, makes its win rates a reward, and samples from the policy that this
reward makes optimal: answers of the fine-tuned policy are accepted with the probability that is missing. The accepted
answers are paired and labelled by the ranker, and the policy is trained on them with a logistic or a hinge loss.

Equation:
    $$ r(x, y) = \operatorname{logit} P(y \succ y_b \mid x) \tag{1} $$
    $$ \pi^*(y \mid x) \propto \pi_{\mathrm{sft}}(y \mid x) \exp\bigl(r(x, y) / \beta\bigr) \tag{2} $$
    $$ P(\text{accept } y) = \exp\Bigl(\frac{r(x, y) - \max_{y'} r(x, y')}{\beta}\Bigr), \qquad
       y \sim \pi_{\mathrm{sft}} \tag{3} $$
    The maximum is over the candidates that are left. Accepted ones are taken out, and the rest is gone through again
    until there are enough.

Symbols:
    y_b: a baseline answer to prompt x.
    r: reward, in nats (log odds).
    beta: temperature of the target; small is greedy.
    pi_sft: the fine-tuned policy that proposes, and the reference of the loss.

Defaults:
    beta: 0.5 (section 5).
    candidates, samples: 64 and 8 to a prompt (section 5); up to the caller here.
    gamma: 0.05, the scale of the margin in the loss (section 5): ``dpo_loss(..., beta=0.05)`` for sigmoid-norm,
        ``hinge_loss(..., beta=0.05)`` for hinge-norm.

Deviations:
    1. Candidates are counted as often as they were drawn; the paper's listing keeps equal texts once, which flattens
       the law where answers repeat.

Reduces to:
    dpo: with an infinite beta all candidates are accepted, and the pairs are those that were drawn.
    best of N: as beta goes to 0, with one sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number

__all__ = ["first_round_pairs", "optimal_policy", "ranker_reward", "rejection_sample", "tournament_pairs"]


def ranker_reward(win_rates: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Rewards from a ranker, eq. (1).

    Args:
        win_rates: probabilities, strictly between 0 and 1, that the answers beat the baseline answer.
    """
    if not ((win_rates > 0) & (win_rates < 1)).all():
        raise ValueError("win_rates: expected probabilities strictly between 0 and 1")
    return torch.special.logit(win_rates)


def optimal_policy(
    ref_logps: Float[Tensor, "*batch answers"], rewards: Float[Tensor, "*batch answers"], beta: float
) -> Float[Tensor, "*batch answers"]:
    """The law of eq. (2) where all answers can be listed, as probabilities.

    Args:
        ref_logps: [..., answers], log-probabilities of all answers under the fine-tuned policy.
        rewards: [..., answers].
        beta: temperature.
    """
    check_number("beta", beta, above=0.0)
    return (ref_logps + rewards / beta).softmax(-1)


def rejection_sample(
    rewards: Float[Tensor, " candidates"],
    num_samples: int,
    beta: float = 0.5,
    *,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " samples"]:
    """Which of the candidates to keep, by eq. (3).

    Args:
        rewards: [candidates], of independent answers of the fine-tuned policy to one prompt.
        num_samples: how many to keep, at most the number of candidates.
        beta: temperature; 0 keeps the best ones, infinity the first ones.
        generator: of the draws.

    Returns:
        [samples] indices, all different, in the order of acceptance.

    Raises:
        ValueError: more samples than candidates, a negative beta, or rewards that are NaN or infinite.
    """
    check_matrix("rewards", rewards, dims=(1,))
    check_count("num_samples", num_samples)
    if num_samples > len(rewards):
        raise ValueError(f"num_samples: expected at most the {len(rewards)} candidates, got {num_samples}")
    if not beta >= 0:
        raise ValueError(f"beta: expected at least 0, got {beta}")
    exact = rewards.double().cpu()
    left = torch.arange(len(rewards))
    accepted: list[int] = []
    while len(accepted) < num_samples:
        below = exact[left] - exact[left].max()
        chance = (below / beta).exp() if beta else (below == 0).double()
        kept = torch.rand(len(left), generator=generator, dtype=torch.float64) < chance
        accepted += left[kept].tolist()
        left = left[~kept]
    return torch.tensor(accepted[:num_samples])


def first_round_pairs(samples: int, beats: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """First-round ranking: neighbours are compared, (0, 1), (2, 3) and so on.

    Args:
        samples: how many answers there are; the last one of an odd number stays out.
        beats: whether the ranker prefers the first answer, given by its number, to the second.

    Returns:
        (preferred, rejected) numbers.
    """
    check_count("samples", samples, least=2)
    return [(i, i + 1) if beats(i, i + 1) else (i + 1, i) for i in range(0, samples - 1, 2)]


def tournament_pairs(samples: int, beats: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Tournament ranking: the winners of each round meet in the next one, which makes samples - 1 pairs.

    Args:
        samples: how many answers there are; who has no opponent goes on to the next round.
        beats: whether the ranker prefers the first answer, given by its number, to the second.

    Returns:
        (preferred, rejected) numbers.
    """
    check_count("samples", samples, least=2)
    pairs, players = [], list(range(samples))
    while len(players) > 1:
        played = [(i, j) if beats(i, j) else (j, i) for i, j in zip(players[::2], players[1::2], strict=False)]
        pairs += played
        players = [winner for winner, _ in played] + (players[-1:] if len(players) % 2 else [])
    return pairs
