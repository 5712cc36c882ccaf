"""How noisy are the policy ratios of tokens and of answers at several lengths, and how much do GRPO and GSPO clip?

Answers are drawn from the small shipped model of Python source. The noise is that of another numeric format: the ratio
of the same weights rounded to bfloat16. The clips act in real updates: a batch of answers, rewarded for lines of less
than 40 characters, is learnt in four mini-batches, the first of which is on-policy.
Quick: 4 seeds of 32 answers, 128 tokens each. Full: 20 seeds of 256 answers, 512 tokens each.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, load_pretrained
from mlreviews.models.generation import Sampler, generate
from mlreviews.preference.gspo import group_advantages, gspo_loss, sequence_ratio
from mlreviews.preference.logps import token_logps
from mlreviews.preference.open_rs import grpo_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2507.18071"
PROMPT, GROUP = 64, 8
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
LOSSES = {"GRPO": grpo_loss, "GSPO": gspo_loss}


class _Answers(NamedTuple):
    """Prompts with their answers [batch, prompt + length], old log-probabilities [batch, length] and advantages."""

    ids: Tensor
    logp: Tensor
    advantages: Tensor


def run(settings: Settings) -> Outcome:
    """Measures the spread of ratios against length, then the share of clipped tokens."""
    seeds, batch, length = (20, 256, 512) if settings.full else (4, 32, 128)
    lengths = [2**i for i in range(3, int(math.log2(length)) + 1)]
    model = load_pretrained("python-draft").to(settings.device)
    rounded = copy.deepcopy(model).bfloat16().float()
    spreads: dict[str, list[Tensor]] = {"token": [], "answer, GSPO": [], "answer, product": []}
    shares: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    for seed in settings.track(range(seeds), "seeds"):
        answers = _draw_answers(model, batch, length, settings.generator(seed))
        with torch.no_grad():
            noise = _logps(rounded, answers.ids) - answers.logp
        for name, spread in _spreads(noise, lengths).items():
            spreads[name].append(spread)
        for name in LOSSES:
            shares[name].append([_clipped(name, model, answers, rate) for rate in RATES])
    slopes = {name: [_slope(lengths, s) for s in runs] for name, runs in spreads.items()}
    middle = RATES.index(1e-4)
    share = {name: sum(runs[middle] for runs in shares[name]) / seeds for name in LOSSES}
    more = [sum(a) / len(RATES) - sum(b) / len(RATES) for a, b in zip(shares["GSPO"], shares["GRPO"], strict=True)]
    claims = [
        measure(
            "GSPO's log-ratio of an answer gets less noisy with its length, as averages do (power of the length)",
            f"{PAPER}, section 4.1",
            slopes["answer, GSPO"],
            at_least=-0.65,
            at_most=-0.35,
        ),
        measure(
            "The log-ratio of single tokens, GRPO's, stays as noisy at any length (power of the length)",
            f"{PAPER}, section 3",
            slopes["token"],
            at_least=-0.15,
            at_most=0.15,
        ),
        measure(
            "The plain ratio of whole answers gets noisier (power of the length)",
            f"{PAPER}, section 4.1",
            slopes["answer, product"],
            at_least=0.35,
        ),
        measure(
            "At the longest answers GSPO's ratio is less noisy than a token's (standard deviation, GSPO / token)",
            f"{PAPER}, section 4.1",
            [float(a[-1] / b[-1]) for a, b in zip(spreads["answer, GSPO"], spreads["token"], strict=True)],
            at_most=0.2,
        ),
        measure(
            "With the paper's clips GSPO clips more tokens than GRPO (difference in shares, mean over learning rates)",
            f"{PAPER}, section 5.2",
            more,
            at_least=0.05,
        ),
        measure(
            "... between ten and a thousand times as many (the paper: about a hundred), at a learning rate of 1e-4",
            f"{PAPER}, section 5.2",
            share["GSPO"] / max(share["GRPO"], 1e-6),
            at_least=10,
            at_most=1000,
            unit="times",
        ),
    ]
    series = {"length": [float(n) for n in lengths]}
    series |= {f"noise, {name}": torch.stack(runs).mean(0).tolist() for name, runs in spreads.items()}
    series |= {"learning rate": list(RATES)}
    series |= {f"clipped, {name}": torch.tensor(runs).mean(0).tolist() for name, runs in shares.items()}
    return Outcome(claims, series)


def _draw_answers(model: TinyLM, batch: int, length: int, generator: torch.Generator) -> _Answers:
    device = next(model.parameters()).device
    windows = python_source().validation.batches(PROMPT, batch // GROUP, generator)
    prompts = next(windows).repeat_interleave(GROUP, 0).to(device)
    tokens = generate(model, prompts, length, sampler=Sampler(temperature=1.0), generator=generator).tokens
    ids = torch.cat([prompts, tokens], 1)
    with torch.no_grad():
        logp = _logps(model, ids)
    return _Answers(ids, logp, group_advantages(_short_lines(tokens), GROUP))


def _logps(model: TinyLM, ids: Tensor) -> Tensor:
    """Log-probabilities of the answers' tokens, [batch, length]."""
    logits = model(ids[:, :-1]).logits[:, PROMPT - 1 :]
    return token_logps(logits, ids[:, PROMPT:])


def _short_lines(tokens: Tensor) -> Tensor:
    """Share of an answer's lines that have less than 40 characters."""
    texts = [bytes(t for t in row if t < 256).split(b"\n") for row in tokens.tolist()]
    return torch.tensor([sum(len(line) < 40 for line in lines) / len(lines) for lines in texts])


def _spreads(noise: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Standard deviations of log-ratios over answers cut to each length."""
    zero = torch.zeros_like(noise)
    found: dict[str, list[Tensor]] = {"token": [], "answer, GSPO": [], "answer, product": []}
    for n in lengths:
        mask = torch.arange(noise.shape[1], device=noise.device).expand_as(noise) < n
        mean = sequence_ratio(noise, zero, mask).log()
        found["token"].append(noise[:, :n].std())
        found["answer, GSPO"].append(mean.std())
        found["answer, product"].append((n * mean).std())
    return {name: torch.stack(values).cpu() for name, values in found.items()}


def _slope(lengths: list[int], spread: Tensor) -> float:
    """The power of the length with which a spread grows, by least squares on logarithms."""
    x = torch.tensor(lengths).log()
    return float(((x - x.mean()) * spread.log()).sum() / (x - x.mean()).square().sum())


def _clipped(name: str, model: TinyLM, answers: _Answers, rate: float) -> float:
    """Share of tokens without gradient because of the clip, over the mini-batches after the first of four."""
    trained = copy.deepcopy(model)
    optimiser = torch.optim.Adam(trained.parameters(), lr=rate)
    order = torch.arange(len(answers.ids)).view(-1, GROUP)
    shares = []
    for groups in order.chunk(4):
        index = groups.flatten()
        logp, old = _logps(trained, answers.ids[index]), answers.logp[index]
        mask = torch.ones_like(old, dtype=torch.bool)
        loss, stats = LOSSES[name](logp, old, mask, answers.advantages[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        shares.append(float(stats["clip_fraction"]))
    return sum(shares[1:]) / len(shares[1:])


def draw(outcome: Outcome) -> Figure:
    """Noise against length, and clipped tokens against the size of updates."""
    figure, (left, right) = panels(2)
    series = outcome.series
    for name in ("token", "answer, GSPO", "answer, product"):
        left.loglog(series["length"], series[f"noise, {name}"], marker="o", label=name)
    left.set(
        title="Rounding to bfloat16", xlabel="tokens of the answer", ylabel="standard deviation of log-ratio (nats)"
    )
    left.legend(loc="lower left")
    for name in LOSSES:
        shares = [max(value, 1e-5) for value in series[f"clipped, {name}"]]
        right.loglog(series["learning rate"], shares, marker="o", label=name)
    right.set(title="Clipped tokens", xlabel="learning rate of Adam", ylabel="share of tokens (1e-5: none)")
    right.legend()
    return figure
