"""Does the contrast of layers tell what a language model knows better than its last layer does?

The shipped model of Python source, on held-out files. How far each layer's distribution is from the last one's is
measured where a name begins (a hard byte) and where an indentation goes on (an easy one). Then the model has to tell
the name that stands in the text from three names of the same length in the same file, by log-probability: of the last
layer, of DoLa with either bucket, and with each single layer. No facts about the world are asked, for which the model
is too small.
Quick: 5 groups of 40 questions, 15 seconds. Full: 10 groups of 300.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlreviews.datasets import ByteTokenizer, TextSplit, python_source
from mlreviews.decoding.dola import DoLa, candidate_layers, contrast_logits, dola_logits, js_divergence
from mlreviews.models import TinyLM, load_pretrained
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2309.03883"
ALPHA = 0.1
CONTEXT = 160  # bytes before a name
CHOICES = 4
NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{3,11}")


class Question(NamedTuple):
    """Text before a name, and the names to choose from, all of one length; the first is the one that stands there."""

    context: bytes
    names: list[bytes]


def run(settings: Settings) -> Outcome:
    """Measures divergences by layer, and how many questions each way of scoring answers."""
    groups, asked = (10, 300) if settings.full else (5, 40)
    model = load_pretrained("python-target").to(settings.device)
    text = python_source().validation
    found: dict[str, list[list[float]]] = {}
    for group in settings.track(range(groups), "groups of questions"):
        questions = _questions(text, asked, random.Random(settings.seed * 1009 + group))
        for name, values in _measured(model, questions, settings.device).items():
            found.setdefault(name, []).append(values)
    layers = model.config.layers
    dola, plain = ([row[0] for row in found[f"accuracy, {name}"]] for name in ("DoLa, high", "last layer"))
    static = found["accuracy, single layers"]
    names, spaces = found["divergence, names begin"], found["divergence, indentation"]
    half = slice(layers // 2, layers)
    claims = [
        measure(
            "Late layers still change what they expect where a name begins, more than in indentation (divergence from "
            "the last layer, mean over the second half of the layers, ratio)",
            f"{PAPER}, figure 2",
            [sum(a[half]) / sum(b[half]) for a, b in zip(names, spaces, strict=True)],
            at_least=1,
        ),
        measure(
            "DoLa tells the true name from others more often than the last layer does (accuracy gained)",
            f"{PAPER}, table 1",
            [a - b for a, b in zip(dola, plain, strict=True)],
            at_least=0,
        ),
        measure(
            "To choose the layer for each token is better than a fixed layer of the bucket, on average over these "
            "(accuracy gained)",
            f"{PAPER}, section 4.1",
            [a - sum(row) / len(row) for a, row in zip(dola, static, strict=True)],
            at_least=0,
        ),
        measure(
            "The premature layer differs from token to token (share of tokens with another than the commonest)",
            f"{PAPER}, section 2.2",
            [row[0] for row in found["share of other layers"]],
            at_least=0.1,
        ),
    ]
    series = {name: torch.tensor(rows).mean(0).tolist() for name, rows in found.items()}
    series["layers"] = [float(layer) for layer in range(layers)]
    series["single layers"] = [float(layer) for layer in candidate_layers(layers, "high", tied=True)]
    return Outcome(claims, series)


def _questions(text: TextSplit, count: int, draw: random.Random) -> list[Question]:
    """Names in held-out files, at random places, with others of their length from the same file."""
    found: list[Question] = []
    while len(found) < count:
        document = text.document(draw.choice(text.files))
        places = [match for match in NAME.finditer(document) if match.start() >= CONTEXT]
        if not places:
            continue
        place = draw.choice(places)
        name = place.group()
        others = sorted({m.group() for m in places if len(m.group()) == len(name)} - {name})
        if len(others) >= CHOICES - 1:
            before = document[place.start() - CONTEXT : place.start()]
            found.append(Question(before, [name, *draw.sample(others, CHOICES - 1)]))
    return found


@torch.no_grad()
def _measured(model: TinyLM, questions: list[Question], device: str) -> dict[str, list[float]]:
    """Everything about one group of questions."""
    tokenizer, layers = ByteTokenizer(), model.config.layers
    contexts = torch.stack([tokenizer.encode(question.context) for question in questions]).to(device)
    out = model(contexts, hidden_states=True)
    (begins, spaces), divergence = _kinds(contexts), _divergences(model, out.hidden_states)
    rows = {
        "divergence, names begin": divergence[:, begins].mean(1).tolist(),
        "divergence, indentation": divergence[:, spaces].mean(1).tolist(),
    }
    singles = candidate_layers(layers, "high", tied=True)
    ways = ("last layer", "DoLa, low", "DoLa, high", *map(str, singles))
    answers: dict[str, list[bool]] = {name: [] for name in ways}
    for i, question in enumerate(questions):
        names = torch.stack([tokenizer.encode(name) for name in question.names]).to(device)
        repeated = torch.full((CHOICES,), i, device=device)
        # the last token of the context goes with the names: its logits are those of their first bytes
        ids = torch.cat([contexts[i, -1:].expand(CHOICES, 1), names[:, :-1]], 1)
        said = model(ids, out.cache.crop(CONTEXT - 1).rows(repeated), hidden_states=True)
        scored = {"last layer": said.logits}
        for bucket in ("low", "high"):
            early = DoLa(model, bucket).early_logits(said.hidden_states)
            scored[f"DoLa, {bucket}"] = dola_logits(said.logits, early, ALPHA)[0]
        for layer, logits in zip(singles, early, strict=True):
            scored[str(layer)] = contrast_logits(said.logits, logits, ALPHA)
        for name, logits in scored.items():
            # tokens that are left out get what the authors give them
            log_p = logits.log_softmax(-1).clamp(min=-1000).gather(2, names[:, :, None]).sum((1, 2))
            answers[name].append(int(log_p.argmax()) == 0)
    share = {name: [sum(right) / len(right)] for name, right in answers.items()}
    rows |= {f"accuracy, {name}": share[name] for name in ways[:3]}
    rows["accuracy, single layers"] = [share[str(layer)][0] for layer in singles]
    commonest = divergence[singles].argmax(0).flatten().bincount().max()
    rows["share of other layers"] = [1 - float(commonest) / contexts.numel()]
    return rows


def _kinds(ids: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, time] each: whether the byte after this one begins a name, and whether it is a space after a space."""
    letter = ((ids | 32) >= ord("a")) & ((ids | 32) <= ord("z")) | (ids == ord("_"))
    space = ids == ord(" ")
    # a name follows the last byte of a context
    next_letter, next_space = (
        torch.cat([x[:, 1:], x.new_full((len(ids), 1), last)], 1) for x, last in ((letter, True), (space, False))
    )
    return next_letter & ~letter, next_space & space


def _divergences(model: TinyLM, states: tuple[Tensor, ...] | None) -> Tensor:
    """[layers, batch, time], of each layer's distribution, the embedding's first, from the last one's."""
    assert states is not None
    last = model.lm_head(states[-1]).log_softmax(-1)
    return torch.stack([js_divergence(last, model.lm_head(model.norm(h)).log_softmax(-1)) for h in states[:-1]])


def draw(outcome: Outcome) -> Figure:
    """Divergence from the last layer by layer, and the share of questions answered."""
    figure, (change, right) = panels(2)
    series = outcome.series
    for name, label in (("names begin", "where a name begins"), ("indentation", "in indentation")):
        change.plot(series["layers"], series[f"divergence, {name}"], marker="o", label=label)
    change.set(title="How far from the last layer", xlabel="layer", ylabel="Jensen-Shannon divergence (nats)")
    change.set_ylim(0, 0.8)
    change.legend()
    names = ["last layer", "DoLa, low", "DoLa, high"]
    bars = [series[f"accuracy, {name}"][0] for name in names] + list(series["accuracy, single layers"])
    labels = [*names, *(f"layer {layer:.0f} alone" for layer in series["single layers"])]
    right.barh(labels[::-1], bars[::-1], color=["C1"] * len(series["single layers"]) + ["C0", "C0", "C6"])
    right.axvline(1 / CHOICES, color="black", linestyle=":", label="chance")
    right.set(title="The true name of four", xlabel="share of questions answered", xlim=(0, 1))
    right.grid(axis="y", visible=False)
    right.legend()
    return figure
