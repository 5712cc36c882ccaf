"""What experiments with verifiable rewards share: a model of Python source finishes a line, and Python judges it.

A prompt ends within a line of code whose own rest is a statement that parses, so that every prompt has a right answer.
Policies are trained by GRPO on prompts from the training files. What has been learnt is measured on held-out files: how
many drawn lines parse, and how long they are; what has been unlearnt is measured there in bits per byte of plain text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlreviews.datasets import ByteTokenizer, TextSplit
from mlreviews.models import CausalLM, Sampler, TinyLM, generate
from mlreviews.preference.gspo import group_advantages
from mlreviews.preference.open_rs import grpo_loss
from mlreviews.preference.rewards import line_parses
from mlreviews.preference.trainer import Rollouts, completion_logps, prepare, rollout, train

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CONTEXT", "LONGEST", "Skill", "independent", "line_prompts", "practise", "skill", "written_lines"]

LONGEST = 20  # tokens of an answer, its line break included
CONTEXT = 48  # bytes of a prompt
WINDOW, WINDOWS = 256, 16  # of plain text


class Skill(NamedTuple):
    """What is measured of a model.

    Attributes:
        parses: [prompts], 1 where the line that was drawn parses.
        lengths: [prompts], bytes of the answer without its line break.
        bits: [windows], bits per byte of plain text.
    """

    parses: Tensor
    lengths: Tensor
    bits: Tensor


def line_prompts(split: TextSplit, count: int, seed: int) -> list[str]:
    """Texts of ASCII that end within a line of code; with its own rest, of up to LONGEST bytes, the line parses.

    Args:
        split: where they are taken from, at random places.
        count: how many.
        seed: of the places.
    """
    chance = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        text = split.document(chance.choice(split.files)).decode()
        if len(text) <= CONTEXT:
            continue
        place = chance.randrange(CONTEXT, len(text))
        prompt, rest = text[place - CONTEXT : place], text[place:].partition("\n")[0] + "\n"
        line = prompt.rpartition("\n")[2].strip()
        code = bool(line) and not line.startswith("#") and prompt.isascii()
        if code and len(rest) <= LONGEST and line_parses(prompt, rest):
            found.append(prompt)
    return found


def practise(
    policy: TinyLM,
    prompts: Sequence[str],
    reward: Callable[[str, str], float],
    *,
    steps: int,
    rate: float,
    batch: int,
    group_size: int,
    generator: torch.Generator,
) -> list[float]:
    """Trains in place by GRPO, on-policy and with no divergence from a reference to pay for.

    Args:
        policy: to be trained.
        prompts: of the training part.
        reward: from a prompt and an answer to a number.
        steps: each draws `batch` prompts and `group_size` answers to each.
        rate: of Adam.
        batch: prompts of a step.
        group_size: answers to a prompt.
        generator: draws prompts and answers.

    Returns:
        The mean reward of each step's answers.
    """
    rewards: list[float] = []

    def draw(generator: torch.Generator) -> Rollouts:
        chosen = torch.randint(len(prompts), (batch,), generator=generator).tolist()
        drawn = rollout(
            policy,
            [prompts[i] for i in chosen],
            reward,
            group_size=group_size,
            max_new_tokens=LONGEST,
            generator=generator,
        )
        rewards.append(float(drawn.rewards.mean()))
        return drawn

    def loss(drawn: Rollouts) -> Tensor:
        advantages = group_advantages(drawn.rewards, group_size)
        return grpo_loss(completion_logps(policy, drawn), drawn.logp_old, drawn.labels_mask, advantages).loss

    optimiser = torch.optim.Adam(policy.parameters(), lr=rate, betas=(0.9, 0.95))
    for _ in train(policy, optimiser, draw, loss, steps=steps, generator=generator):
        pass
    return rewards


def skill(model: CausalLM, prompts: Sequence[str], text: TextSplit, generator: torch.Generator) -> Skill:
    """Draws one answer to each prompt at temperature 1, and reads some plain text.

    Args:
        model: of bytes.
        prompts: held out.
        text: held out; windows come from places spread over it.
        generator: draws the answers.
    """
    return Skill(*written_lines(model, prompts, generator), _bits(model, text))


@torch.no_grad()
def written_lines(model: CausalLM, prompts: Sequence[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first two of `Skill`; arguments as there."""
    device = model.lm_head.weight.device
    ids, real, _ = (x.to(device) for x in prepare(prompts))
    mask = None if bool(real.all()) else real
    sampler, stop = Sampler(temperature=1.0), ByteTokenizer().encode("\n").tolist()
    drawn = generate(model, ids, LONGEST, sampler=sampler, mask=mask, generator=generator, stop_tokens=stop)
    answers = [ByteTokenizer().decode(drawn.row(i)) for i in range(len(prompts))]
    parses = [line_parses(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return torch.tensor(parses), torch.tensor([float(len(answer.partition("\n")[0])) for answer in answers])


@torch.no_grad()
def _bits(model: CausalLM, text: TextSplit) -> Tensor:
    starts = torch.linspace(0, len(text.data) - WINDOW - 1, WINDOWS).long()
    window = text.data[starts[:, None] + torch.arange(WINDOW + 1)].long()
    window = window.masked_fill(window == 0, ByteTokenizer.eos).to(model.lm_head.weight.device)
    nats = torch.nn.functional.cross_entropy(
        model(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none"
    )
    return nats.view(WINDOWS, WINDOW).mean(1).cpu() / math.log(2)


def independent(changes: Sequence[Tensor], groups: int = 16) -> list[float]:
    """Values that claims can be made of: the means of trainings, or of groups of prompts where there is but one.

    Args:
        changes: of each training, [prompts or windows].
        groups: a divisor of their number.
    """
    rows = changes[0].view(groups, -1) if len(changes) == 1 else torch.stack(list(changes))
    means: list[float] = rows.mean(1).tolist()
    return means
