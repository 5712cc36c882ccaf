"""What do the cosine reward and the division by an answer's length do to accuracy and to the length of answers?

Reasoning as a table: at each step a policy thinks on or answers. Thinking helps up to a point: after n steps an answer
is right with probability 0.2 + 0.7 (1 - exp(-n/s)), s = 1, 2, 4 and 8 for four kinds of questions. For the division by
the length there is a second world as well, in which thinking harms: 0.9 - 0.7 (1 - exp(-n/s)). Six answers a question
and step, as in the paper; accuracies and lengths of the policies are exact.
Quick: 12 runs of 200 steps. Full: 40 runs of 1000 steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.gspo import group_advantages
from mlreviews.preference.open_rs import cosine_length_reward, dr_grpo_loss, grpo_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2503.16219"
DR_GRPO = "arXiv:2503.20783"
LONGEST, GROUP, RATE = 48, 6, 0.05
PATIENCE = torch.tensor([1.0, 2.0, 4.0, 8.0])
# Being right after n steps of thinking: [questions, lengths]
HELPS = 0.2 + 0.7 * (1 - (-torch.arange(LONGEST + 1) / PATIENCE[:, None]).exp())
METHODS = ("GRPO, accuracy", "GRPO, cosine", "Dr. GRPO, accuracy")
HARMED = "thinking harms: "


def run(settings: Settings) -> Outcome:
    """Trains with both rewards and both losses."""
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
    claims = [
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
    """Accuracy and lengths during training."""
    figure, axes = panels(2, rows=2)
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
    return figure
