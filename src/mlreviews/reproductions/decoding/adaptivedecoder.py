"""Does a small network learn from preferences which texts want a low temperature and which a high one?

The shipped model of Python source goes on with two kinds of text. Lines of code get 1 where they parse; comments get
the number of their different characters, over the most there can be, as a stand-in for stories. Nothing tells the
network which is which but the model's hidden state at the end of the prompt, where it chooses one temperature for the
answer. It is trained on the best and the worst of several answers to each prompt, at temperatures drawn evenly, by the
loss of temperatures alone, and judged on held-out files against each fixed temperature. Sizes and the training of the
network were chosen with another seed. Where there is one training, claims are about groups of held-out prompts.
Quick: one training with the small model, 320 prompts of 8 answers, 192 held-out prompts. Full: 5 trainings with the
large one, 1,000 prompts of 16 answers, 800 held-out prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlreviews.datasets import ByteTokenizer, TextSplit, python_source
from mlreviews.decoding.adaptivedecoder import TEMPERATURES, AdaptiveDecoder, best_and_worst, lpo_temperature_loss
from mlreviews.models import Sampler, TinyLM, generate, load_pretrained
from mlreviews.preference.rewards import line_parses
from mlreviews.reproductions.completed_lines import CONTEXT, LONGEST, independent, line_prompts
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2411.09661"
HELD_SAMPLES = 4  # answers to a held-out prompt at each temperature
KINDS = ("code", "comments")


def run(settings: Settings) -> Outcome:
    """Trains a network for each seed, and scores its choices and all fixed temperatures."""
    trainings = 5 if settings.full else 1
    model = load_pretrained("python-target" if settings.full else "python-draft").to(settings.device)
    rows = [_one(settings, model, seed) for seed in settings.track(range(trainings), "trainings")]
    tables = torch.stack([table for table, _ in rows]).unflatten(
        1, (2, -1)
    )  # [trainings, kinds, prompts, temperatures]
    choices = torch.stack([chosen for _, chosen in rows]).unflatten(1, (2, -1))
    adaptive = tables.gather(3, choices[..., None])[..., 0]
    means = tables.mean((0, 2))
    code, comments = (
        list(adaptive[:, kind] - tables[:, kind, :, int(means[kind].argmax())]) for kind in range(len(KINDS))
    )
    best = int(means.mean(0).argmax())
    degrees = torch.tensor(TEMPERATURES)[choices]
    claims = [
        measure(
            "Code gets lower temperatures than comments do (difference of means)",
            f"{PAPER}, on what is chosen",
            independent(list(degrees[:, 0] - degrees[:, 1])),
            at_most=0.0,
        ),
        measure(
            "On both kinds together the choices score higher than the best fixed temperature (difference)",
            f"{PAPER}, experiments",
            independent(list((adaptive - tables[..., best]).mean(1))),
            at_least=0.0,
        ),
        measure(
            "On code they score as the best temperature for code does (difference)",
            f"{PAPER}, experiments",
            independent(code),
            at_least=-0.03,
        ),
        measure(
            "... and on comments as the best for comments (difference)",
            f"{PAPER}, experiments",
            independent(comments),
            at_least=-0.03,
        ),
    ]
    series = {"temperatures": list(TEMPERATURES)}
    for i, kind in enumerate(KINDS):
        series[f"{kind}, fixed"] = means[i].tolist()
        series[f"{kind}, chosen"] = adaptive[:, i].mean(1).tolist()
        counts = choices[:, i].flatten().bincount(minlength=len(TEMPERATURES))
        series[f"share, {kind}"] = (counts / counts.sum()).tolist()
    return Outcome(claims, series)


def _one(settings: Settings, model: TinyLM, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of held-out prompts at each temperature, [prompts, temperatures], and what is chosen, [prompts]."""
    prompts, samples, held = (1000, 16, 800) if settings.full else (320, 8, 192)
    corpus, generator = python_source(), settings.generator(seed)
    practised = _prompts(corpus.train, prompts, 1000 * settings.seed + seed)
    decoder = _trained(model, practised, samples, generator)
    held_out = _prompts(corpus.validation, held, 1000 * settings.seed + seed)
    every = torch.arange(len(TEMPERATURES)).repeat_interleave(HELD_SAMPLES).expand(held, -1)
    scores = _scores(model, held_out, every, generator)
    with torch.no_grad():
        chosen = decoder(_hidden(model, held_out)).argmax(1).cpu()
    return scores.unflatten(1, (-1, HELD_SAMPLES)).mean(2), chosen


def _prompts(split: TextSplit, count: int, seed: int) -> list[str]:
    """Half of them end in a line of code, half at the beginning of a comment."""
    chance, comments = random.Random(seed), list[str]()
    while len(comments) < count // 2:
        text = split.document(chance.choice(split.files)).decode()
        end = text.find(" # ", chance.randrange(len(text))) + 3
        prompt = text[max(end - CONTEXT, 0) : end]
        if end > CONTEXT and prompt.isascii():
            comments.append(prompt)
    return [*line_prompts(split, count // 2, seed), *comments]


def _trained(model: TinyLM, prompts: Sequence[str], samples: int, generator: torch.Generator) -> AdaptiveDecoder:
    choices = torch.randint(len(TEMPERATURES), (len(prompts), samples), generator=generator)
    which, best, worst = best_and_worst(_scores(model, prompts, choices, generator))
    h = _hidden(model, prompts)[which]
    chosen, rejected = (choices[which, side, None].to(h.device) for side in (best, worst))
    decoder = AdaptiveDecoder(h.shape[1], hidden=32, generator=generator).to(h)

    def loss() -> Tensor:
        log_p = decoder(h)
        return lpo_temperature_loss(log_p.gather(1, chosen)[:, 0], log_p.gather(1, rejected)[:, 0], beta=1.0).mean()

    for _ in training(decoder, loss, 60, 3e-3, weight_decay=0.1):
        pass
    return decoder


@torch.no_grad()
def _hidden(model: TinyLM, prompts: Sequence[str]) -> Tensor:
    """The model's last hidden states at the ends of the prompts, [prompts, d_model]."""
    states = model(_ids(model, prompts), hidden_states=True).hidden_states
    assert states is not None
    return states[-1][:, -1]


def _ids(model: TinyLM, prompts: Sequence[str]) -> Tensor:
    return torch.stack([ByteTokenizer().encode(prompt) for prompt in prompts]).to(model.lm_head.weight.device)


def _scores(model: TinyLM, prompts: Sequence[str], choices: Tensor, generator: torch.Generator) -> Tensor:
    """Scores of answers, one to a prompt for each of its chosen temperatures, [prompts, samples] as `choices`."""
    scores, ids = torch.empty(choices.shape), _ids(model, prompts)
    scorers: list[Callable[[str, str], float]] = [line_parses, _variety]
    stop: Any = ByteTokenizer().encode("\n").tolist()
    for i, temperature in enumerate(TEMPERATURES):
        rows, places = (choices == i).nonzero(as_tuple=True)
        sampler = Sampler(temperature=temperature)
        drawn = generate(model, ids[rows], LONGEST, sampler=sampler, generator=generator, stop_tokens=stop)
        for j, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
            score = scorers[row >= len(prompts) // 2]
            scores[row, place] = score(prompts[row], ByteTokenizer().decode(drawn.row(j)))
    return scores


def _variety(prompt: str, answer: str) -> float:
    return len(set(answer)) / LONGEST


def draw(outcome: Outcome) -> Figure:
    """Scores by temperature beside those of the choices, and what is chosen."""
    figure, (scores, choices) = panels(2)

    def mean(name: str) -> float:
        values = outcome.series[name]
        return sum(values) / len(values)

    series, temperatures = outcome.series, outcome.series["temperatures"]
    curves = {"code: lines that parse": series["code, fixed"], "comments: variety": series["comments, fixed"]}
    curves["both"] = [sum(pair) / 2 for pair in zip(*curves.values(), strict=True)]
    levels = [mean(f"{kind}, chosen") for kind in KINDS]
    levels.append(sum(levels) / 2)
    for colour, ((label, curve), level) in enumerate(zip(curves.items(), levels, strict=True)):
        scores.plot(temperatures, curve, color=f"C{colour}", marker="o", label=label)
        scores.axhline(level, color=f"C{colour}", linestyle="--")
    scores.set(title="Held-out prompts", xlabel="fixed temperature", ylabel="score (dashed: temperatures chosen)")
    scores.set_ylim(0, 0.9)
    scores.legend()
    for offset, kind in ((-0.035, "code"), (0.035, "comments")):
        choices.bar([t + offset for t in temperatures], series[f"share, {kind}"], width=0.07, label=kind)
    choices.set(title="What is chosen", xlabel="temperature", ylabel="share of prompts")
    choices.legend()
    return figure
