"""Does thinking before the next token pay under the reward of its prediction, and what does that reward do to a model?

First a source whose next token has to be computed. It has easy places, where the next token repeats the last one, and
hard ones, a quarter, where it is the sum modulo 3 of two tokens that stand before it; a tenth of all tokens are noise.
A step of the policies, in tables, sees the place and one of the two tokens: a thought (one of six) the first, a
prediction the second and the thought. The first token is 0 half of the time. Policies without thoughts are trained
under the same reward, and policies with thoughts at hard places only, found by the entropy of a proxy that knows the
source as far as one can without thinking. All train on 16 places a step, 8 outputs to each; accuracies are exact.

Then Python source, without thoughts: the small shipped model predicts the next byte at places of training files that
are not too easy, 8 times each, and is judged on held-out files. Its proxy is itself as it was; places are easy from an
entropy of 0.5 nats on, medium from 1 and hard from 1.5.
Quick: 16 runs of 100 steps; 3 runs of 15 steps on 8 windows of 128 bytes. Full: 100 runs of 500; 8 runs of 200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, load_pretrained
from mlreviews.preference.rpt import hard_positions, rpt_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2506.08007"
GROUP = 8
TOKENS, THOUGHTS, PLACES, RATE, NOISE, HARD = 3, 6, 16, 0.05, 0.1, 0.25
FIRST = torch.tensor([0.5, 0.25, 0.25])
VALUES = torch.arange(TOKENS)
# What the source says but for noise, by place (easy, hard) and both tokens.
SAID = torch.stack([VALUES.expand(TOKENS, -1), (VALUES[:, None] + VALUES) % TOKENS])
NO_THOUGHT, THOUGHT, FILTERED = "no thoughts", "thoughts", "thoughts, hard places only"
WINDOWS, WINDOW, TEXT_RATE, LEVELS = 8, 128, 1e-4, (0.5, 1.0, 1.5)
SPLITS = ("easy", "medium", "hard")


class Place(NamedTuple):
    """Places of the source and what is predicted there, [runs, outputs] each."""

    hard: Tensor
    first: Tensor
    second: Tensor
    thought: Tensor
    prediction: Tensor


class Predictors:
    """Independent policies that think (or not) and predict; all tables hold logits.

    Attributes:
        thought: [runs, easy or hard, first token, thoughts].
        prediction: [runs, easy or hard, second token, predictions].
        heard: [runs, easy or hard, thoughts, second token, predictions], added to those; 0 without thoughts.
    """

    def __init__(self, runs: int, thinking: bool, generator: torch.Generator) -> None:
        self.thinking, self.row = thinking, torch.arange(runs)[:, None]
        self.thought = torch.randn(runs, 2, TOKENS, THOUGHTS, generator=generator)
        self.heard = torch.randn(runs, 2, THOUGHTS, TOKENS, TOKENS, generator=generator) * thinking
        self.prediction = torch.zeros(runs, 2, TOKENS, TOKENS)
        self.parameters = [self.prediction, *([self.thought, self.heard] if thinking else [])]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def odds(self, hard: Tensor, second: Tensor, thought: Tensor) -> Tensor:
        """Logits of predictions, [runs, outputs, tokens]."""
        return self.prediction[self.row, hard, second] + self.heard[self.row, hard, thought, second]

    def draw(self, hard: Tensor, first: Tensor, second: Tensor, generator: torch.Generator) -> Place:
        """Thoughts and predictions at places, [runs, outputs]."""
        with torch.no_grad():
            thought = _drawn(self.thought[self.row, hard, first], generator)
            prediction = _drawn(self.odds(hard, second, thought), generator)
        return Place(hard, first, second, thought, prediction)

    def logps(self, place: Place) -> Tensor:
        """[runs, outputs, tokens]: of the thought, if there is one, and of the prediction."""
        hard, first, second, thought, prediction = place
        found = [_logp(self.odds(hard, second, thought), prediction)]
        if self.thinking:
            found.insert(0, _logp(self.thought[self.row, hard, first], thought))
        return torch.stack(found, -1)

    def accuracy(self) -> tuple[Tensor, Tensor]:
        """Probability of a right prediction at easy and at hard places, exact, [runs] each."""
        with torch.no_grad():
            thought = self.thought.softmax(-1)
            prediction = (self.prediction[:, :, None] + self.heard).softmax(-1)
            chance = torch.einsum("rhft,rhtsp->rhfsp", thought, prediction)
            said = chance.gather(-1, SAID.expand(len(chance), -1, -1, -1)[..., None])[..., 0]
            right = (1 - NOISE) * said + NOISE / 2 * (1 - said)
            easy, hard = (right.mean(3) * FIRST).sum(2).unbind(1)
            return easy, hard


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(logits.shape[:2])


def _logp(logits: Tensor, index: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]


def run(settings: Settings) -> Outcome:
    """Trains on the source with and without thoughts, then on Python."""
    runs, steps = (100, 500) if settings.full else (16, 100)
    series = {"steps": [float(i) for i in range(steps + 1)]}
    ends: dict[str, Tensor] = {}
    for kind in settings.track((NO_THOUGHT, THOUGHT, FILTERED), "trainings on the source"):
        easy, hard = _on_source(kind, runs, steps, settings.generator())
        ends[kind] = hard[-1]
        series[f"easy, {kind}"], series[f"hard, {kind}"] = easy.mean(1).tolist(), hard.mean(1).tolist()
    gains, greedy, nats = [], [], []
    trainings, text_steps = (8, 200) if settings.full else (3, 15)
    for stream in settings.track(range(1, trainings + 1), "trainings on Python"):
        gain, best, change = _on_text(text_steps, settings.generator(stream), settings.device)
        gains.append(gain)
        greedy.append(best)
        nats.append(change)
    for name, column in zip(SPLITS, zip(*gains, strict=True), strict=True):
        series[f"gain on Python, {name}"] = list(column)
    at_once = 0.5 * (1 - NOISE) + 0.5 * NOISE / 2
    claims = [
        measure(
            "Where the next token has to be computed, thinking makes predictions better under the same reward "
            "(accuracy at hard places, difference to no thoughts)",
            f"{PAPER}, experiments",
            (ends[THOUGHT] - ends[NO_THOUGHT]).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and better than predictions without a thought can be (accuracy at hard places)",
            f"{PAPER}, experiments",
            ends[THOUGHT].tolist(),
            at_least=at_once,
        ),
        measure(
            "Leaving out what a proxy is sure of teaches more in as many places (accuracy at hard ones, difference)",
            f"{PAPER}, on the filter",
            (ends[FILTERED] - ends[THOUGHT]).tolist(),
            at_least=0.0,
        ),
    ]
    for name, column in zip(SPLITS, zip(*gains, strict=True), strict=True):
        claims.append(
            measure(
                f"On held-out Python the next byte is predicted better at {name} places (gain in probability)",
                f"{PAPER}, table 1",
                list(column),
                at_least=0.0,
            )
        )
    claims += [
        measure(
            "... and the most likely byte is right more often, at all of these places together (change of the share)",
            f"{PAPER}, table 1",
            greedy,
            at_least=0.0,
        ),
        measure(
            "Accuracy is not likelihood: the cross-entropy of held-out Python gets worse (change)",
            "eq. (3) of the card",
            nats,
            at_least=0.0,
            unit="nats per byte",
        ),
    ]
    return Outcome(claims, series)


def _on_source(kind: str, runs: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Accuracies at easy and hard places, [steps + 1, runs]."""
    policies = Predictors(runs, kind != NO_THOUGHT, generator)
    optimiser = torch.optim.Adam(policies.parameters, lr=RATE)
    # What follows, by place and second token: all that one step sees.
    law = torch.nn.functional.one_hot(SAID, TOKENS) * (1 - 1.5 * NOISE) + NOISE / 2
    proxy = (law * FIRST[:, None, None]).sum(1)
    kept = hard_positions(proxy.log(), threshold=0.5) if kind == FILTERED else torch.ones(2, TOKENS) > 0
    chance = (torch.tensor([1 - HARD, HARD])[:, None] * kept).flatten()
    history = [policies.accuracy()]
    for _ in range(steps):
        where = torch.multinomial(chance.expand(runs, -1), PLACES, True, generator=generator)
        hard, second = where // TOKENS, where % TOKENS
        first = torch.multinomial(FIRST.expand(runs, -1), PLACES, True, generator=generator)
        truth = _drawn(law[hard, first, second].log(), generator)
        hard, first, second, truth = (x.repeat_interleave(GROUP, 1) for x in (hard, first, second, truth))
        place = policies.draw(hard, first, second, generator)
        logp = policies.logps(place).flatten(0, 1)
        rewards = (place.prediction == truth).float().flatten()
        loss = rpt_loss(logp, logp.detach(), torch.ones_like(logp) > 0, rewards, GROUP).loss * runs  # nothing is shared
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(policies.accuracy())
    easy, hard = (torch.stack(curve) for curve in zip(*history, strict=True))
    return easy, hard


def _on_text(steps: int, generator: torch.Generator, device: str) -> tuple[list[float], float, float]:
    """On held-out text: gains in the next byte's probability by level; changes of greedy accuracy and cross-entropy."""
    model, proxy = load_pretrained("python-draft").to(device), load_pretrained("python-draft").to(device)
    held_out = next(python_source().validation.batches(WINDOW, 32, torch.Generator().manual_seed(0))).to(device)
    levels = _levels(proxy, held_out)
    before, right_before = _next_byte(model, held_out)
    optimiser = torch.optim.Adam(model.parameters(), lr=TEXT_RATE)
    windows = python_source().train.batches(WINDOW, WINDOWS, generator)
    for _ in range(steps):
        text = next(windows).to(device)
        at = _levels(proxy, text) > 0
        logits = model(text[:, :-1]).logits[at]
        with torch.no_grad():
            guesses = torch.multinomial((logits / 0.8).softmax(-1).cpu(), GROUP, True, generator=generator).to(device)
        logp = (logits / 0.8).log_softmax(-1).gather(1, guesses).view(-1, 1)
        rewards = (guesses == text[:, 1:][at][:, None]).float().flatten()
        loss = rpt_loss(logp, logp.detach(), torch.ones_like(logp) > 0, rewards, GROUP).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    after, right_after = _next_byte(model, held_out)
    gain = after.exp() - before.exp()
    more_right = (right_after.float() - right_before.float())[levels > 0]
    by_level = [float(gain[levels == level].mean()) for level in (1, 2, 3)]
    return by_level, float(more_right.mean()), float((before - after).mean())


def _levels(proxy: TinyLM, text: Tensor) -> Tensor:
    """How many of the levels the proxy's entropy reaches at each byte but the first, [windows, bytes]."""
    with torch.no_grad():
        logits = proxy(text[:, :-1]).logits
    return torch.stack([hard_positions(logits, threshold=level) for level in LEVELS]).sum(0)


def _next_byte(model: TinyLM, text: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each byte but the first, and whether it is the most likely one, [windows, bytes]."""
    with torch.no_grad():
        logits = model(text[:, :-1]).logits
    return _logp(logits, text[:, 1:]), logits.argmax(-1) == text[:, 1:]


def draw(outcome: Outcome) -> Figure:
    """Accuracy on the source during training, and the gains on Python."""
    figure, axes = panels(2)
    for kind in (NO_THOUGHT, THOUGHT, FILTERED):
        axes[0].plot(outcome.series["steps"], outcome.series[f"hard, {kind}"], label=kind)
    axes[0].set(title="Hard places of the source", xlabel="steps", ylabel="probability of the next token")
    axes[0].legend()
    for place, name in enumerate(SPLITS):
        values = outcome.series[f"gain on Python, {name}"]
        axes[1].plot([place] * len(values), values, "o", color="C0")
    axes[1].axhline(0, color="0.4", linestyle=":")
    axes[1].set_xticks(range(len(SPLITS)), SPLITS)
    axes[1].set_xlim(-0.5, len(SPLITS) - 0.5)
    axes[1].set(title="Next byte of Python", xlabel="by the proxy's entropy", ylabel="gain in probability, each run")
    return figure
