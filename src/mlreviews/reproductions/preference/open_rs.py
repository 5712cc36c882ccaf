"""What do the cosine reward and the division by an answer's length do to accuracy and to the length of answers?

First on a language model: the shipped model of Python source finishes lines, the cosine reward of lines that parse is
all it learns from, and what it draws on held-out files is measured before and after; so is what it unlearns of plain
text. Where there is one training, its claims are about groups of held-out prompts. The step size and the bound on
unlearning were chosen after trials with another seed; half the prompts left the first claim open at +0.12.

Then where all is known, reasoning as a table: at each step a policy thinks on or answers. Thinking helps up to a point:
after n steps an answer is right with probability 0.2 + 0.7 (1 - exp(-n/s)), s = 1, 2, 4 and 8 for four kinds of
questions. For the division by the length there is a second world as well, in which thinking harms:
0.9 - 0.7 (1 - exp(-n/s)). Six answers a question and step, as in the paper; accuracies and lengths of the policies are
exact.
Quick: one training of the language model with 8 steps of 32 answers, 12 tables with 200 steps. Full: 4 trainings with
60 steps of 64 answers, 40 tables with 1000 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import load_pretrained
from mlreviews.preference.gspo import group_advantages
from mlreviews.preference.open_rs import cosine_length_reward, dr_grpo_loss, grpo_loss
from mlreviews.preference.rewards import line_parses
from mlreviews.reproductions.completed_lines import LONGEST as LONGEST_LINE
from mlreviews.reproductions.completed_lines import Skill, independent, line_prompts, practise, skill
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mlreviews.models import TinyLM

PAPER = "arXiv:2503.16219"
DR_GRPO = "arXiv:2503.20783"
LONGEST, GROUP, RATE = 48, 6, 0.05
PATIENCE = torch.tensor([1.0, 2.0, 4.0, 8.0])
# Being right after n steps of thinking: [questions, lengths]
HELPS = 0.2 + 0.7 * (1 - (-torch.arange(LONGEST + 1) / PATIENCE[:, None]).exp())
METHODS = ("GRPO, accuracy", "GRPO, cosine", "Dr. GRPO, accuracy")
HARMED = "thinking harms: "


def run(settings: Settings) -> Outcome:
    """Trains the language model, then the tables with both rewards and both losses."""
    before, after, rewards = _language_model(settings)
    runs, steps = (40, 1000) if settings.full else (12, 200)
    series = {"steps": [float(i) for i in range(steps + 1)]}
    ends: dict[tuple[str, str], Tensor] = {}
    worlds = [(method, HELPS, method) for method in METHODS]
    worlds += [(method, 1.1 - HELPS, HARMED + method) for method in METHODS[::2]]
    for method, chances, label in settings.track(worlds, "trainings"):
        for name, curve in _train(method, chances, runs, steps, settings.generator()).items():
            series[f"{name}, {label}"] = curve.mean(1).tolist()
            ends[name, label] = curve[-1]
            ends[f"first {name}", label] = curve[0]
    plain, cosine, doctor = METHODS
    series |= {"reward of a step": torch.tensor(rewards).mean(0).tolist()}
    for name in Skill._fields:
        for point, skills in (("before", [before]), ("after", after)):
            series[f"{name} {point}"] = [float(getattr(s, name).mean()) for s in skills]

    def change(name: str) -> list[float]:
        return independent([getattr(s, name) - getattr(before, name) for s in after])

    claims = [
        measure(
            "The shipped language model writes more lines that parse on held-out files after GRPO (change of share)",
            f"{PAPER}, experiments",
            change("parses"),
            at_least=0.0,
        ),
        measure(
            "... and shorter ones, as the cosine reward asks for (change)",
            f"{PAPER}, on the cosine reward",
            change("lengths"),
            at_most=0.0,
            unit="bytes",
        ),
        measure(
            "... and unlearns little of plain text (rise of the cross-entropy)",
            f"ours; {PAPER} finds language drift",
            change("bits"),
            at_most=0.1,
            unit="bits per byte",
        ),
        measure(
            "GRPO on verified answers raises accuracy (difference to the first policy)",
            f"{PAPER}, experiments",
            (ends["accuracy", plain] - ends["first accuracy", plain]).tolist(),
            at_least=0.0,
        ),
        measure(
            "The cosine reward makes answers shorter than accuracy alone (length ratio)",
            f"{PAPER}, on the cosine reward",
            (ends["length", cosine] / ends["length", plain]).tolist(),
            at_most=1.0,
        ),
        measure(
            "... at no more than three points of accuracy (difference)",
            f"{PAPER}, experiments",
            (ends["accuracy", cosine] - ends["accuracy", plain]).tolist(),
            at_least=-0.03,
        ),
        measure(
            "GRPO's division by the length makes wrong answers longer where thinking helps (length ratio to Dr. GRPO)",
            f"{DR_GRPO}, on the bias of GRPO",
            (ends["length if wrong", plain] / ends["length if wrong", doctor]).tolist(),
            at_least=1.0,
        ),
        measure(
            "... and leaves them longer where it harms (length ratio to Dr. GRPO)",
            f"{DR_GRPO}, on the bias of GRPO",
            (ends["length if wrong", HARMED + plain] / ends["length if wrong", HARMED + doctor]).tolist(),
            at_least=1.0,
        ),
        measure(
            "Without the divisions, Dr. GRPO is as accurate (difference to GRPO)",
            f"{DR_GRPO}, experiments",
            (ends["accuracy", doctor] - ends["accuracy", plain]).tolist(),
            at_least=-0.03,
        ),
    ]
    return Outcome(claims, series)


def _language_model(settings: Settings) -> tuple[Skill, list[Skill], list[list[float]]]:
    """Skills before and after each training, and the rewards of its steps."""
    trainings, steps, batch, rate = (4, 60, 8, 1e-4) if settings.full else (1, 8, 4, 3e-4)
    corpus = python_source()
    held_out = line_prompts(corpus.validation, 1024 if settings.full else 256, settings.seed)

    def measured(model: TinyLM) -> Skill:
        return skill(model, held_out, corpus.validation, settings.generator(500))

    policy = load_pretrained("python-target").to(settings.device)
    before, after, rewards = measured(policy), [], []
    for training in settings.track(range(trainings), "language models"):
        policy = load_pretrained("python-target").to(settings.device)
        rewards.append(
            practise(
                policy,
                line_prompts(corpus.train, 1000, 1000 * settings.seed + training),
                _cosine_of_parsing,
                steps=steps,
                rate=rate,
                batch=batch,
                group_size=8,
                generator=settings.generator(501 + training),
            )
        )
        after.append(measured(policy))
    return before, after, rewards


def _cosine_of_parsing(prompt: str, answer: str) -> float:
    length = len(answer.partition("\n")[0])
    parses = torch.tensor([line_parses(prompt, answer) == 1])
    return float(cosine_length_reward(parses, torch.tensor([length]), LONGEST_LINE))


def _train(method: str, chances: Tensor, runs: int, steps: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Exact accuracy and lengths of the policies, [steps + 1, runs] each."""
    # At first 1 in 13 steps is the last one: answers of 12 steps on average.
    logits = torch.full((runs, len(PATIENCE), LONGEST), -2.5, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=RATE)
    history = [_expectations(logits, chances)]
    time = torch.arange(LONGEST)
    for _ in range(steps):
        stop = torch.nn.functional.logsigmoid(logits)
        think = torch.nn.functional.logsigmoid(-logits)
        coins = torch.rand(runs, len(PATIENCE), GROUP, LONGEST, generator=generator)
        stops = coins < stop.detach().exp()[:, :, None]
        # The first step that stops; LONGEST where none does, and then nothing was chosen at that point.
        lengths = torch.where(stops.any(-1), stops.int().argmax(-1), LONGEST)
        chosen = torch.where(time == lengths[..., None], stop[:, :, None], think[:, :, None])
        right = chances[torch.arange(len(PATIENCE))[None, :, None], lengths]
        correct = torch.rand(right.shape, generator=generator) < right
        rewards = correct.float().flatten()
        if method == METHODS[1]:
            rewards = cosine_length_reward(correct.flatten(), lengths.flatten(), LONGEST)
        logp = chosen.flatten(0, 2)
        mask = time <= lengths.flatten()[:, None]
        count = GROUP * len(PATIENCE)  # a run's own mean: runs don't share anything
        advantages = group_advantages(rewards, GROUP, normalise_std=method != METHODS[2])
        if method == METHODS[2]:
            loss = dr_grpo_loss(logp, logp.detach(), mask, advantages, max_length=LONGEST, normaliser=count).loss
        else:
            loss = grpo_loss(logp, logp.detach(), mask, advantages, normaliser=count).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(_expectations(logits, chances))
    return {name: torch.stack([point[name] for point in history]) for name in history[0]}


def _expectations(logits: Tensor, chances: Tensor) -> dict[str, Tensor]:
    """Accuracy, mean length and mean length of wrong answers, over the questions, [runs] each."""
    stop = torch.cat([logits.detach().sigmoid(), torch.ones(*logits.shape[:2], 1)], -1)
    going = torch.cat([torch.ones(*logits.shape[:2], 1), (1 - stop[..., :-1]).cumprod(-1)], -1)
    law = going * stop  # of the lengths
    length = torch.arange(LONGEST + 1.0)
    wrong = law * (1 - chances)
    return {
        "accuracy": (law * chances).sum(-1).mean(1),
        "length": (law * length).sum(-1).mean(1),
        "length if wrong": (wrong * length).sum((1, 2)) / wrong.sum((1, 2)),
    }


def draw(outcome: Outcome) -> Figure:
    """Accuracy and lengths of the tables during training; what the language model draws before and after."""
    figure, axes = panels(2, rows=3)
    titles = {"accuracy": "Accuracy", "length": "Length of answers", "length if wrong": "Length of wrong answers"}
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        for method in METHODS:
            axis.plot(outcome.series["steps"], outcome.series[f"{name}, {method}"], label=method)
        axis.set(title=title, xlabel="steps", ylabel="share correct" if name == "accuracy" else "tokens")
    for method, colour in zip(METHODS[::2], ("C0", "C2"), strict=True):
        curve = outcome.series[f"length if wrong, {HARMED}{method}"]
        axes[3].plot(outcome.series["steps"], curve, color=colour, label=method)
    axes[3].set(title="Wrong answers where thinking harms", xlabel="steps", ylabel="tokens")
    axes[0].legend()
    _draw_language_model(outcome, axes[4], axes[5])
    return figure


def _draw_language_model(outcome: Outcome, rewards: Axes, shares: Axes) -> None:
    curve = outcome.series["reward of a step"]
    rewards.plot(range(1, len(curve) + 1), curve, marker="o")
    rewards.set(title="Language model: answers drawn in training", xlabel="steps", ylabel="cosine reward")
    labels = {"parses": "lines that\nparse", "lengths": "length,\n20 bytes = 1", "bits": "text, bits\nper byte"}
    for offset, point in ((-0.2, "before"), (0.2, "after")):
        values = [outcome.series[f"{name} {point}"] for name in labels]
        means = [sum(v) / len(v) / scale for v, scale in zip(values, (1, LONGEST_LINE, 1), strict=True)]
        bars = shares.barh([place + offset for place in range(3)], means, height=0.36, label=point)
        shares.bar_label(bars, fmt="%.2f", padding=3)
    shares.set(title="... and on held-out files", xlim=(0, 1.6))
    shares.set_yticks(range(3), labels.values())
    shares.invert_yaxis()
    shares.grid(axis="y", visible=False)
    shares.legend()
