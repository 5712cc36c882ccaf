r"""RLCF: preference pairs labelled by a checklist that belongs to the prompt, in place of a reward model's score.

Paper: Checklists Are Better Than Reward Models For Aligning Language Models (arXiv:2507.18624)

What makes an answer good differs from instruction to instruction, and a reward model has one scale for all. Here each
instruction comes with a list of requirements and their importance, written by a strong model that has seen answers of
several qualities. A judge scores each requirement by itself, and where it can be checked by a program, the program's
verdict counts as much as the judge's. The weighted mean decides which of two sampled answers is preferred; pairs that
differ much in at least one requirement are kept and train the policy by DPO.

Equation:
    $$ s_i = \frac{1}{n} \sum_{j=1}^n J_j(x, y, c_i) \quad \text{or, with a program } V_i, \quad
       s_i = \frac12 \Bigl(\frac{1}{n} \sum_{j=1}^n J_j(x, y, c_i) + 100\, V_i(x, y)\Bigr) \tag{1} $$
    $$ S(x, y) = \frac{\sum_i w_i s_i}{\sum_i w_i} \tag{2} $$
    Of two answers the one with the larger S is preferred. Of all pairs those with the largest
    $$ g = \max_i \bigl(s_i(y_w) - s_i(y_l)\bigr) \tag{3} $$
    are kept, and the policy is trained on them by the loss of DPO.

Symbols:
    x, y: instruction and answer.
    c_i, w_i: a requirement, and its importance, 0 to 100.
    J: score that the judge gives, 0 to 100; it is asked n times.
    V: verdict of a program, 0 or 1.
    s: [items], scores; S: their weighted mean, 0 to 100.
    g: largest difference in one requirement.

Defaults:
    weight: 100 (ours; the authors' code has it for the requirement that they add to all lists).
    samples: 25 (the authors' code).
    keep: 0.4 (the paper, on the choice of pairs; an option without a default in the authors' code).
    temperature: 1.3 (the authors' code, for the two answers).
    beta: 0.1 (the authors' code).
    epochs: 2 (the paper, on training; the script in the authors' code stops at 6).

Deviations:
    1. The answers are drawn from the whole distribution; the authors' code cuts it at a top-p of 0.95.
    2. Eq. (3) looks at requirements that the preferred answer meets better, as the authors' code does. The number of
       pairs kept is rounded up, theirs down.
    3. Answers of equal S give no pair; in the authors' code the order of such a pair is random.
    4. Where the list and the judge come from is up to the caller: both are language models in the paper.

Reduces to:
    dpo: one requirement and keep = 1: DPO on all pairs, labelled by that score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_finite, check_matrix, check_number
from mlreviews.models import CausalLM
from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.losses import PolicyLoss
from mlreviews.preference.rewards import Reward
from mlreviews.preference.trainer import pair_logps, rollout, train

__all__ = [
    "ChecklistItem",
    "ChecklistPair",
    "GradedAnswers",
    "checklist_pairs",
    "checklist_score",
    "grade",
    "grade_samples",
    "largest_gaps",
    "train_on_pairs",
]

ItemJudge = Callable[[str, str, str], float]


@dataclass(frozen=True)
class ChecklistItem:
    """A requirement of an instruction.

    Attributes:
        text: what is required, as a question or a sentence for the judge.
        weight: importance, 0 to 100.
        verifier: a program that checks it, where there is one: from a prompt and an answer to 0 or 1.
    """

    text: str
    weight: float = 100.0
    verifier: Reward | None = None

    def __post_init__(self) -> None:
        check_number("weight", self.weight, least=0.0)


class GradedAnswers(NamedTuple):
    """Two answers to a prompt with their scores.

    Attributes:
        prompt: the text.
        answers: two texts.
        scores: [2, items], of `grade`.
        weights: [items].
    """

    prompt: str
    answers: tuple[str, str]
    scores: Float[Tensor, "2 items"]
    weights: Float[Tensor, " items"]


class ChecklistPair(NamedTuple):
    """A preferred and a rejected answer.

    Attributes:
        prompt: the text.
        chosen: the answer with the larger weighted score.
        rejected: the other one.
        margin: difference of the weighted scores, above 0.
        gap: largest difference in one requirement, eq. (3).
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float
    gap: float


def grade(
    judge: ItemJudge, checklist: Sequence[ChecklistItem], prompt: str, answer: str, *, samples: int = 25
) -> Float[Tensor, " items"]:
    """Scores of an answer, one for each requirement, eq. (1).

    Args:
        judge: from a prompt, an answer and the text of a requirement to a score from 0 to 100.
        checklist: of the prompt.
        prompt: the instruction.
        answer: to be graded.
        samples: how often the judge is asked about each requirement.

    Returns:
        [items], from 0 to 100.

    Raises:
        ValueError: an empty list, no samples, a score that isn't from 0 to 100, or a verdict that isn't 0 or 1.
    """
    check_count("samples", samples)
    if not checklist:
        raise ValueError("checklist: expected at least one requirement")
    scores = []
    for item in checklist:
        asked = [float(judge(prompt, answer, item.text)) for _ in range(samples)]
        if not all(0 <= score <= 100 for score in asked):
            raise ValueError(f"judge: expected scores from 0 to 100, got {asked}")
        score = sum(asked) / samples
        if item.verifier is not None:
            verdict = item.verifier(prompt, answer)
            if verdict not in (0, 1):
                raise ValueError(f"verifier: expected a verdict of 0 or 1, got {verdict!r}")
            score = (score + 100 * verdict) / 2
        scores.append(score)
    return torch.tensor(scores)


def checklist_score(
    scores: Float[Tensor, "*batch items"], weights: Float[Tensor, "*batch items"]
) -> Float[Tensor, "*batch"]:
    """The weighted mean of an answer's scores, eq. (2).

    Args:
        scores: [..., items].
        weights: [..., items], at least 0 and not all 0; 0 for what isn't on the list.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, a negative weight, or a list without any weight.
    """
    if scores.shape != weights.shape:
        raise ValueError(f"weights: expected shape {tuple(scores.shape)}, got {tuple(weights.shape)}")
    check_finite("scores", scores)
    check_finite("weights", weights)
    total = weights.sum(-1)
    if (weights < 0).any() or (total <= 0).any():
        raise ValueError("weights: expected none below 0, and one above 0 in each list")
    return (weights * scores).sum(-1) / total


def largest_gaps(gaps: Float[Tensor, " pairs"], keep: float = 0.4) -> Int[Tensor, " kept"]:
    """Which pairs to keep, those of the largest gaps first.

    Args:
        gaps: [pairs], of eq. (3).
        keep: share to keep, above 0 and at most 1; their number is rounded up.

    Raises:
        ValueError: no pairs, NaN or infinite gaps, or a share that makes no sense.
    """
    check_matrix("gaps", gaps, dims=(1,))
    check_number("keep", keep, above=0.0)
    if keep > 1:
        raise ValueError(f"keep: expected at most 1, got {keep}")
    # 0.7 * 10 is a little more than 7.
    count = math.ceil(keep * len(gaps) - 1e-9)
    return gaps.argsort(descending=True, stable=True)[:count]


def checklist_pairs(graded: Sequence[GradedAnswers], *, keep: float = 0.4) -> list[ChecklistPair]:
    """Pairs to train on, those of the largest gaps first.

    Args:
        graded: two answers each to any number of prompts.
        keep: share to keep of the pairs whose weighted scores differ.

    Raises:
        ValueError: as `checklist_score` and `largest_gaps`; all pairs are tied.
    """
    pairs = []
    for prompt, answers, scores, weights in graded:
        first, second = checklist_score(scores, weights.expand_as(scores)).tolist()
        if first == second:
            continue
        best = int(second > first)
        gap = float((scores[best] - scores[1 - best]).max())
        pairs.append(ChecklistPair(prompt, answers[best], answers[1 - best], abs(first - second), gap))
    if not pairs:
        raise ValueError("graded: expected at least one prompt whose answers differ in their weighted scores")
    return [pairs[i] for i in largest_gaps(torch.tensor([pair.gap for pair in pairs]), keep).tolist()]


def grade_samples(
    policy: CausalLM,
    prompts: Sequence[str],
    checklists: Sequence[Sequence[ChecklistItem]],
    judge: ItemJudge,
    *,
    max_new_tokens: int,
    samples: int = 25,
    temperature: float = 1.3,
    generator: torch.Generator | None = None,
) -> list[GradedAnswers]:
    """Draws two answers to each prompt and grades them by its checklist.

    Args:
        policy: a byte-level model. Prompts to which it draws bytes that are no text are left out.
        prompts: texts.
        checklists: one for each prompt.
        judge: as of `grade`.
        max_new_tokens: of each answer; a line break ends it.
        samples: as of `grade`.
        temperature: of the draws.
        generator: draws the answers.

    Raises:
        ValueError: another number of lists than of prompts, or as `grade` and `rollout`.
    """
    if len(checklists) != len(prompts):
        raise ValueError(f"checklists: expected one for each of {len(prompts)} prompts, got {len(checklists)}")
    drawn = rollout(
        policy,
        prompts,
        lambda prompt, answer: 0.0,
        group_size=2,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
    )
    graded = []
    for i, (prompt, checklist) in enumerate(zip(prompts, checklists, strict=True)):
        first, second = drawn.answers[2 * i : 2 * i + 2]
        if "\ufffd" in first + second:  # what stands for such bytes has other tokens than they had
            continue
        scores = torch.stack([grade(judge, checklist, prompt, a, samples=samples) for a in (first, second)])
        graded.append(GradedAnswers(prompt, (first, second), scores, torch.tensor([c.weight for c in checklist])))
    return graded


def train_on_pairs(
    policy: CausalLM,
    reference: CausalLM,
    optimiser: torch.optim.Optimizer,
    pairs: Sequence[ChecklistPair],
    *,
    batch_size: int,
    epochs: int = 2,
    beta: float = 0.1,
    generator: torch.Generator,
) -> Iterator[dict[str, float]]:
    """Trains a policy by DPO; for a further round, draw from it and call this again.

    Args:
        policy: in the mode that it is to be trained in.
        reference: its copy from before the training, without gradient.
        optimiser: of the policy's parameters.
        pairs: of `checklist_pairs`.
        batch_size: pairs a step; the last step of an epoch may have fewer.
        epochs: how often each pair is seen.
        beta: of DPO.
        generator: shuffles the pairs.

    Yields:
        As `train`, with ``margin``, the mean difference of implicit rewards, and ``accuracy``, where it is above 0.

    Raises:
        ValueError: no pairs, or sizes below 1.
    """
    check_count("batch_size", batch_size)
    check_count("epochs", epochs)
    if not pairs:
        raise ValueError("pairs: expected at least one")
    waiting: list[int] = []

    def draw(generator: torch.Generator) -> list[ChecklistPair]:
        if not waiting:
            waiting.extend(torch.randperm(len(pairs), generator=generator).tolist())
        batch = [pairs[i] for i in waiting[:batch_size]]
        del waiting[:batch_size]
        return batch

    def loss(batch: list[ChecklistPair]) -> PolicyLoss:
        prompts, chosen, rejected, _, _ = zip(*batch, strict=True)
        with torch.no_grad():
            known = pair_logps(reference, prompts, chosen, rejected)
        found = dpo_loss(*pair_logps(policy, prompts, chosen, rejected), *known, beta=beta)
        margin = found.chosen_rewards - found.rejected_rewards
        return PolicyLoss(found.losses.mean(), {"margin": margin.mean(), "accuracy": (margin > 0).float().mean()})

    steps = epochs * math.ceil(len(pairs) / batch_size)
    return train(cast(nn.Module, policy), optimiser, draw, loss, steps=steps, generator=generator)
