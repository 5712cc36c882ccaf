"""Does a small language model, trained from preferences to be a reward, steer a larger one towards what is preferred?

The shipped models of Python source finish lines of held-out files. The small one draws answers to prompts of the
training files, and Python says which lines parse; from pairs of answers a copy of the small model becomes the reward
that steers the large one. A language model that was not trained as a reward is the control: to multiply two of them
makes any text likelier. A second reward, for longer answers, is weighted against the first.
Step size, beta_r and beta were chosen on other prompts with the small model alone; the claims about it were added after
a first run, which left those about the large one open. Claims are about groups of held-out
prompts where there is one training.
Quick: 25 steps of 16 pairs, 192 prompts. Full: 4 trainings of 150 steps, 1,024 prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.decoding.adaptivedecoder import best_and_worst
from mlreviews.decoding.genarm import GenARM, arm_loss
from mlreviews.models import CausalLM, TinyLM, load_pretrained
from mlreviews.preference.rewards import line_parses
from mlreviews.preference.trainer import Rollouts, pair_logps, rollout
from mlreviews.reproductions.completed_lines import LONGEST, independent, line_prompts, written_lines
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.08193"
BETAS = (2.0, 1.0, 0.5)
SAMPLES, PAIRS = 6, 16
MIXED = ("parses alone", "half and half", "length alone")


def run(settings: Settings) -> Outcome:
    """Trains the rewards, and looks at what the models write with and without them."""
    trainings = 4 if settings.full else 1
    rows = [_one(settings, i) for i in settings.track(range(trainings), "trainings")]

    def change(name: str, after: str, before: str) -> list[float]:
        return independent([row[after][name] - row[before][name] for row in rows])

    parses, half, length = (f"small, {name}" for name in MIXED)
    claims = [
        measure(
            "A reward makes the small model that it was made of write more lines that parse (change of share)",
            f"{PAPER}, alignment experiments",
            change("parses", "small, beta 1.0", "small"),
            at_least=0.0,
        ),
        measure(
            "... for its training: more than that model does without it (difference of shares)",
            "ours: control",
            change("parses", "small, beta 1.0", "small, control"),
            at_least=0.0,
        ),
        measure(
            "It makes the large model, too, write more lines that parse (change of share)",
            f"{PAPER}, weak-to-strong guidance",
            change("parses", "large, reward", "large"),
            at_least=0.0,
        ),
        measure(
            "... for its training: more than the small model does without it (difference of shares)",
            "ours: control",
            change("parses", "large, reward", "large, control"),
            at_least=0.0,
        ),
        measure(
            "... and the large model so steered is better than the small one (difference of shares)",
            f"{PAPER}, weak-to-strong guidance",
            change("parses", "large, reward", "small, beta 1.0"),
            at_least=0.0,
        ),
        measure(
            "Half the weight for a reward of length makes answers longer than none (difference)",
            f"{PAPER}, multi-objective alignment",
            change("lengths", half, parses),
            at_least=0.0,
            unit="bytes",
        ),
        measure(
            "... and all of it longer than half (difference)",
            f"{PAPER}, multi-objective alignment",
            change("lengths", length, half),
            at_least=0.0,
            unit="bytes",
        ),
        measure(
            "... while half the weight for lines that parse keeps more of them than none (difference of shares)",
            f"{PAPER}, multi-objective alignment",
            change("parses", half, length),
            at_least=0.0,
        ),
    ]
    series = {
        f"{name}, {way}": [float(row[way][name].mean()) for row in rows]
        for way in rows[0]
        for name in ("parses", "lengths")
    }
    return Outcome(claims, series)


def _one(settings: Settings, training: int) -> dict[str, dict[str, Tensor]]:
    """What the models write, by the reward that they are steered by."""
    steps, prompts, held = (150, 400, 1024) if settings.full else (25, 96, 192)
    corpus = python_source()
    small, large = (load_pretrained(name).to(settings.device) for name in ("python-draft", "python-target"))
    generator = settings.generator(training)
    practised = line_prompts(corpus.train, prompts, 1000 * settings.seed + training)
    drawn = rollout(small, practised, line_parses, group_size=SAMPLES, max_new_tokens=LONGEST, generator=generator)
    lengths = drawn.mask.sum(1).float().cpu()
    correct, longer = (
        _trained(small, practised, drawn, scores.view(-1, SAMPLES), steps, generator)
        for scores in (drawn.rewards.cpu(), lengths)
    )
    held_out = line_prompts(corpus.validation, held, settings.seed)

    def written(model: CausalLM) -> dict[str, Tensor]:
        return dict(zip(("parses", "lengths"), written_lines(model, held_out, settings.generator(500)), strict=True))

    found = {
        "large": written(large),
        "large, control": written(GenARM(large, [small])),
        "large, reward": written(GenARM(large, [correct])),
        "small": written(small),
        "small, control": written(GenARM(small, [small])),
    }
    for beta in BETAS:
        found[f"small, beta {beta}"] = written(GenARM(small, [correct], beta=beta))
    found[f"small, {MIXED[0]}"] = found["small, beta 1.0"]
    for name, weight in zip(MIXED[1:], (0.5, 1.0), strict=True):
        found[f"small, {name}"] = written(GenARM(small, [correct, longer], [1 - weight, weight]))
    return found


def _trained(
    start: TinyLM, prompts: Sequence[str], drawn: Rollouts, scores: Tensor, steps: int, generator: torch.Generator
) -> TinyLM:
    """A copy of a model that has become a reward: its answers with the highest scores against those with the lowest."""
    reward = TinyLM(start.config).to(start.lm_head.weight.device)
    reward.load_state_dict(start.state_dict())
    optimiser = torch.optim.Adam(reward.parameters(), lr=1e-3)
    which, chosen, rejected = best_and_worst(scores)
    for _ in range(steps):
        pairs = torch.randint(len(which), (PAIRS,), generator=generator)
        rows = which[pairs]
        answers = [[drawn.answers[i] for i in (rows * SAMPLES + side[pairs]).tolist()] for side in (chosen, rejected)]
        loss = arm_loss(*pair_logps(reward, [prompts[i] for i in rows.tolist()], *answers)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return reward


def draw(outcome: Outcome) -> Figure:
    """Lines that parse by the strength of the reward, and what two rewards make of length and correctness."""
    figure, (strength, mixture) = panels(2)

    def mean(name: str) -> float:
        values = outcome.series[name]
        return sum(values) / len(values)

    powers = [0.0, *(1 / beta for beta in BETAS)]
    shares = [mean("parses, small"), *(mean(f"parses, small, beta {beta}") for beta in BETAS)]
    strength.plot(powers, shares, marker="o", label="small model, reward")
    for model, way, colour in (("large", "reward", "C1"), ("small", "control", "C0"), ("large", "control", "C1")):
        shares = [mean(f"parses, {model}"), mean(f"parses, {model}, {way}")]
        line, what = ("-", "reward") if way == "reward" else (":", "not trained as a reward")
        strength.plot([0, 1], shares, color=colour, linestyle=line, marker="o", label=f"{model} model, {what}")
    strength.set(title="Steered by a small model", xlabel="1 / beta", ylabel="lines that parse (share)")
    strength.set_ylim(0.3, 0.9)
    strength.legend()
    ways = {"no reward": "small", **{name: f"small, {name}" for name in MIXED}}
    for name, way in ways.items():
        x, y = mean(f"lengths, {way}"), mean(f"parses, {way}")
        mixture.plot([x], [y], marker="o", linestyle="", label=name)
    mixture.set(title="Two rewards, the small model", xlabel="length (bytes)", ylabel="lines that parse (share)")
    mixture.legend()
    return figure
