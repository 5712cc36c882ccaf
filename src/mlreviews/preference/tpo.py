r"""TPO: a model learns to think before it answers, from judgements of the answers alone.

Paper: Thinking LLMs: General Instruction Following with Thought Generation (arXiv:2410.10630)
Paper: Meta-Rewarding Language Models: Self-Improving Alignment with LLM-as-a-Meta-Judge (arXiv:2407.19594). Elo scores.

The model is asked to write down its thoughts and, after a marker, its response. Of several outputs to a prompt a judge
sees the responses only; the outputs with the best and the worst response, each with its thoughts, become a pair for
DPO. What was thought is never judged, but what leads to good responses becomes likelier. This is iterated.

Equation:
    $$ o_i = (c_i, y_i) \sim \pi_m(\cdot \mid x), \qquad r_i = \operatorname{judge}(x, y_i), \qquad
       i = 1 \dots K \tag{1} $$
    $$ s_i = N(r_i) - \rho\, N(\ell_i), \qquad
       N(a_i) = \frac{a_i - \operatorname{mean}(a)}{\operatorname{std}(a)} \tag{2} $$
    $$ L = -\log\sigma\Bigl(\beta \log\frac{\pi(o_w \mid x)}{\pi_m(o_w \mid x)}
       - \beta \log\frac{\pi(o_l \mid x)}{\pi_m(o_l \mid x)}\Bigr), \qquad
       w = \arg\max_i s_i, \quad l = \arg\min_i s_i \tag{3} $$
    A judge that compares two responses gives scores by maximum likelihood, with b_ij the wins of i over j:
    $$ r = \arg\max_r \sum_{i,j} b_{ij} \log\sigma(r_i - r_j) - \frac{\lambda}{2} \lvert r \rvert^2 \tag{4} $$

Symbols:
    x: a prompt; o: an output, the thought c, the marker and the response y.
    r: scores of the judge, in its own units; affine changes of them change nothing.
    l_i: length of a response in characters.
    s: scores that decide, without unit.
    rho: weight of the length.
    pi_m: the policy at the start of an iteration; the next one starts from what has been trained.

Defaults:
    group_size: 8 outputs, drawn at a temperature of 0.8 (section 3).
    rho: 0; the paper chooses among values up to 0.5 so that responses don't grow.
    marker: "<R>" (the paper's specific thought prompt); the wording of the prompt is ours.
    beta: 0.1 (DPO).
    ridge: 0.01 (ours).

Deviations:
    1. Nothing is cut off the distribution that outputs are drawn from; the paper takes top-p 0.95.
    2. An iteration takes its steps on all of its pairs at once, without choosing among checkpoints.
    3. Eq. (4) has a weak prior, without which a response that wins every comparison would have an infinite score.

Reduces to:
    dpo: an iteration is DPO on pairs of whole outputs, with the policy that drew them as the reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlreviews.common.checks import check_finite, check_number
from mlreviews.datasets import ByteTokenizer
from mlreviews.models import CausalLM
from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.losses import PolicyLoss, masked_sum
from mlreviews.preference.trainer import Rollouts, as_module, completion_logps, rollout, train

__all__ = [
    "elo_scores",
    "length_controlled_scores",
    "pairwise_judge",
    "split_thought",
    "thought_pairs",
    "train_thoughts",
]

# Scores of the responses to a prompt: the higher the better.
Judge = Callable[[str, Sequence[str]], Sequence[float]]

THOUGHT_PROMPT = "{prompt}\nFirst write down what you think, then after <R> your response: "


def split_thought(output: str, marker: str = "<R>") -> tuple[str, str] | None:
    """Thought and response, without the marker between them; None where there is no marker, or nothing behind it.

    Args:
        output: of the model.
        marker: the first one counts.

    Raises:
        ValueError: an empty marker.
    """
    if not marker:
        raise ValueError("marker: expected a text, got an empty one")
    thought, found, response = output.partition(marker)
    return (thought.strip(), response.strip()) if found and response.strip() else None


def length_controlled_scores(
    scores: Float[Tensor, "*batch group"], lengths: Float[Tensor, "*batch group"], rho: float
) -> Float[Tensor, "*batch group"]:
    """Scores and lengths compared within a group, eq. (2). What is the same for the whole group counts as 0.

    Args:
        scores: [..., group], of the judge.
        lengths: [..., group], of the responses.
        rho: at least 0; so large a one leaves only the length.

    Raises:
        ValueError: shapes differ, an empty group, NaN or infinity, or a negative rho.
    """
    if scores.shape != lengths.shape or scores.numel() == 0:
        came = f"{tuple(scores.shape)} and {tuple(lengths.shape)}"
        raise ValueError(f"scores, lengths: expected the same [..., group] with no empty axis, got {came}")
    check_finite("scores", scores)
    check_finite("lengths", lengths)
    check_number("rho", rho, least=0.0)
    return _normalised(scores) - rho * _normalised(lengths)


def _normalised(values: Tensor) -> Tensor:
    wide = values.double()
    # A standard deviation of equal values need not be 0 in floating point.
    same = wide.amax(-1, keepdim=True) == wide.amin(-1, keepdim=True)
    deviation = wide.std(-1, correction=0, keepdim=True)
    centred = wide - wide.mean(-1, keepdim=True)
    return torch.where(same, 0.0, centred / torch.where(same, 1.0, deviation)).to(values.dtype)


def elo_scores(wins: Float[Tensor, "group group"], *, ridge: float = 0.01) -> Float[Tensor, " group"]:
    """Scores from comparisons, eq. (4), by Newton's method; they sum to 0.

    Args:
        wins: [group, group], how often the row's response was preferred to the column's; halves for ties.
        ridge: lambda > 0.

    Returns:
        [group], in nats: the difference of two is the log odds that one is preferred to the other.

    Raises:
        ValueError: not a square matrix, negative or infinite entries, or a ridge that is not positive.
    """
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or wins.numel() == 0:
        raise ValueError(f"wins: expected a square matrix, got shape {tuple(wins.shape)}")
    check_finite("wins", wins)
    if (wins < 0).any():
        raise ValueError(f"wins: expected at least 0, got {float(wins.min())}")
    check_number("ridge", ridge, above=0.0)
    battles = wins.double() - wins.double().diag().diag()
    games = battles + battles.T
    scores = torch.zeros(len(wins), dtype=torch.float64)
    penalty = ridge * torch.eye(len(wins), dtype=torch.float64)
    for _ in range(100):
        chance = (scores[:, None] - scores).sigmoid()
        slope = battles.sum(1) - (games * chance).sum(1) - ridge * scores
        curvature = games * chance * (1 - chance)
        step = torch.linalg.solve(curvature.sum(1).diag() - curvature + penalty, slope)
        largest = float(step.abs().max())
        scores += step / max(1.0, largest)  # far from the maximum a whole step can overshoot
        if largest < 1e-9:
            break
    return scores.to(wins.dtype)


def pairwise_judge(prefers: Callable[[str, str, str], float]) -> Judge:
    """A judge made of one that compares two responses: all pairs are compared, in both orders.

    Args:
        prefers: from a prompt and two responses to the probability, or the verdict 1 or 0, that the first is better.
    """

    def scores(prompt: str, responses: Sequence[str]) -> list[float]:
        wins = torch.zeros(len(responses), len(responses), dtype=torch.float64)
        for i, j in itertools.permutations(range(len(responses)), 2):
            won = prefers(prompt, responses[i], responses[j])
            wins[i, j] += won
            wins[j, i] += 1 - won
        return elo_scores(wins).tolist()

    return scores


def thought_pairs(
    prompts: Sequence[str], outputs: Sequence[str], judge: Judge, *, marker: str = "<R>", rho: float = 0.0
) -> Int[Tensor, "pairs 2"]:
    """Pairs for DPO, eqs. (1) and (2): the outputs with the best and the worst response to each prompt.

    Outputs without a response are left out. A prompt with fewer than two responses, or all of whose scores are equal
    in the end, gives no pair.

    Args:
        prompts: as the judge is to see them.
        outputs: as many to each prompt, one prompt after another.
        judge: gets a prompt and its responses, never a thought.
        marker: what separates thought and response.
        rho: weight of the responses' length.

    Returns:
        Indices of the chosen and the rejected output, [pairs, 2], int64.

    Raises:
        ValueError: another number of outputs, or the judge gives another number of scores, NaN or infinity.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    if not outputs or len(outputs) % len(prompts):
        raise ValueError(f"outputs: expected as many for each of {len(prompts)} prompts, got {len(outputs)}")
    group_size = len(outputs) // len(prompts)
    pairs = []
    for number, prompt in enumerate(prompts):
        parts = {i: split_thought(outputs[i], marker) for i in range(number * group_size, (number + 1) * group_size)}
        responses = {i: part[1] for i, part in parts.items() if part is not None}
        if len(responses) < 2:
            continue
        judged = judge(prompt, list(responses.values()))
        if len(judged) != len(responses):
            raise ValueError(f"judge: expected {len(responses)} scores, got {len(judged)}")
        lengths = [float(len(response)) for response in responses.values()]
        scores = length_controlled_scores(torch.tensor(judged).double(), torch.tensor(lengths).double(), rho)
        if scores.max() > scores.min():
            index = list(responses)
            pairs.append((index[int(scores.argmax())], index[int(scores.argmin())]))
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def train_thoughts(
    policy: CausalLM,
    optimiser: torch.optim.Optimizer,
    prompts: Sequence[str],
    judge: Judge,
    *,
    iterations: int,
    updates: int,
    max_new_tokens: int,
    generator: torch.Generator,
    template: str = THOUGHT_PROMPT,
    marker: str = "<R>",
    stop: str = "\n",
    group_size: int = 8,
    temperature: float = 0.8,
    rho: float = 0.0,
    beta: float = 0.1,
    tokenizer: ByteTokenizer | None = None,
) -> Iterator[dict[str, float]]:
    """The whole procedure: draw outputs, judge the responses, DPO on the pairs, and once more.

    Args:
        policy: to be trained; its state at the start of an iteration is the reference.
        optimiser: of its parameters.
        prompts: to which outputs are drawn in each iteration.
        judge: as of `thought_pairs`.
        iterations: how often outputs are drawn.
        updates: steps on the pairs of an iteration.
        max_new_tokens: of an output, thought and response together.
        generator: draws the outputs.
        template: what the policy is asked, with ``{prompt}`` where the prompt goes.
        marker: what separates thought and response.
        stop: one token as text; it ends an output.
        group_size: K, outputs to each prompt.
        temperature: at which they are drawn; the loss is that of the policy itself.
        rho: weight of the responses' length.
        beta: of DPO.
        tokenizer: None for `mlreviews.datasets.ByteTokenizer`.

    Yields:
        After each iteration, what `train` gives, and with it ``pairs``, how many there were, and ``margin``, the mean
        difference of their implicit rewards before the last update.

    Raises:
        ValueError: a template without the prompt, or as `rollout` and `thought_pairs`.
    """
    if "{prompt}" not in template:
        raise ValueError(f"template: expected one with {{prompt}} in it, got {template!r}")
    asked = [template.replace("{prompt}", prompt) for prompt in prompts]

    def draw(generator: torch.Generator) -> tuple[Rollouts, Tensor] | None:
        outputs = rollout(
            policy,
            asked,
            lambda prompt, output: 0.0,  # judged below, where prompts are known without the template
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            generator=generator,
            tokenizer=tokenizer,
        )
        index = thought_pairs(prompts, outputs.answers, judge, marker=marker, rho=rho).T.flatten()
        if len(index) == 0:
            return None
        pairs = _rows(outputs, index)
        with torch.no_grad():
            return pairs, _output_logps(policy, pairs)

    def loss(batch: tuple[Rollouts, Tensor] | None) -> PolicyLoss:
        if batch is None:  # nothing to learn: a gradient of 0
            nothing = policy.lm_head.weight.sum() * 0.0
            return PolicyLoss(nothing, {"pairs": torch.tensor(0), "margin": torch.tensor(0.0)})
        pairs, reference = batch
        found = dpo_loss(*_output_logps(policy, pairs).chunk(2), *reference.chunk(2), beta=beta)
        margin = (found.chosen_rewards - found.rejected_rewards).mean()
        return PolicyLoss(found.losses.mean(), {"pairs": torch.tensor(len(found.losses)), "margin": margin})

    yield from train(as_module(policy), optimiser, draw, loss, steps=iterations, generator=generator, updates=updates)


def _rows(drawn: Rollouts, index: Tensor) -> Rollouts:
    index = index.to(drawn.ids.device)
    answers = tuple(drawn.answers[i] for i in index.tolist())
    ids, real, mask, rewards, logp_old = (x[index] for x in drawn[:5])
    return Rollouts(ids, real, mask, rewards, logp_old, drawn.temperature, answers)


def _output_logps(policy: CausalLM, drawn: Rollouts) -> Tensor:
    """Log-probabilities of whole outputs, [batch]: thoughts count as responses do."""
    return masked_sum(completion_logps(policy, drawn, temperature=1.0), drawn.labels_mask)
