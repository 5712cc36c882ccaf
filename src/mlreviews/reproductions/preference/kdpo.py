"""Does KDPO change an answer of a language model, and leave the rest of what it says alone?

The shipped byte model of Python source is made to continue a text differently from how it would: its own greedy
continuation of 8 bytes with two of them replaced. Each edit starts from the shipped weights and goes on until the model
gives the new answer, for at most 60 steps of AdamW: by KDPO, by DPO against the model's former answer, and by plain
fine-tuning. Locality is the divergence of the next-byte laws on other texts.
Quick: 6 edits, half a minute. Full: 40 edits.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, load_pretrained
from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.kdpo import kdpo_loss
from mlreviews.preference.logps import sequence_logps
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2406.09920"
METHODS = ("KDPO", "DPO", "fine-tuning")
PROMPT, ANSWER, STEPS, BETA = 40, 8, 60, 0.1


def run(settings: Settings) -> Outcome:
    """Measures how often edits succeed, and how far the model moves elsewhere."""
    edits = 40 if settings.full else 6
    model = load_pretrained("python-draft").requires_grad_(False)
    source = python_source().validation
    others = next(source.batches(63, 16, settings.generator(0)))
    with torch.no_grad():
        before = model(others).logits.log_softmax(-1)
    success: dict[str, list[float]] = {name: [] for name in METHODS}
    moved: dict[str, list[float]] = {name: [] for name in METHODS}
    for edit in settings.track(range(edits), "edits"):
        generator = settings.generator(1 + edit)
        prompt = next(source.batches(PROMPT - 1, 1, generator))
        old = _greedy(model, prompt)
        new = old.clone()
        for place in (2, 5):
            letter = int(torch.randint(ord("a"), ord("z") + 1, (), generator=generator))
            new[0, place] = letter if letter != old[0, place] else letter ^ 1
        for name in METHODS:
            edited = _edited(model, prompt, new, old, name)
            with torch.no_grad():
                said = edited(torch.cat([prompt, new[:, :-1]], 1)).logits[:, PROMPT - 1 :].argmax(-1)
                after = edited(others).logits.log_softmax(-1)
            success[name].append(float(torch.equal(said, new)))
            moved[name].append(float((before.exp() * (before - after)).sum(-1).mean()))
    ratio = {name: [k / m for k, m in zip(moved["KDPO"], moved[name], strict=True)] for name in METHODS}
    claims = [
        measure(
            "KDPO makes its edits in 60 steps (share of edits)",
            f"{PAPER}, table 1",
            sum(success["KDPO"]) / edits,
            at_least=0.9,
        ),
        measure(
            "It has moved less on other texts than after fine-tuning (ratio of divergences)",
            f"{PAPER}, section 5",
            ratio["fine-tuning"],
            at_most=1,
        ),
        measure(
            "... and than after DPO against its former answer (ratio of divergences)",
            f"{PAPER}, section 5.3",
            ratio["DPO"],
            at_most=1,
        ),
        measure(
            "DPO against the former answer makes fewer edits (share of edits, KDPO minus DPO)",
            f"{PAPER}, section 5.3",
            (sum(success["KDPO"]) - sum(success["DPO"])) / edits,
            at_least=0,
        ),
    ]
    series = {f"divergence, {name}": moved[name] for name in METHODS}
    series |= {f"success, {name}": success[name] for name in METHODS}
    return Outcome(claims, series)


def _greedy(model: TinyLM, prompt: Tensor) -> Tensor:
    """What the model says next, [1, ANSWER]."""
    ids = prompt
    with torch.no_grad():
        for _ in range(ANSWER):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -ANSWER:]


def _edited(model: TinyLM, prompt: Tensor, new: Tensor, old: Tensor, method: str) -> TinyLM:
    """A copy of the model that is tuned until it gives the new answer."""
    edited = copy.deepcopy(model).requires_grad_(True)
    both = torch.cat([torch.cat([prompt, new], 1), torch.cat([prompt, old], 1)])
    inputs, labels = both[:, :-1], both[:, 1:]
    mask = (torch.arange(labels.shape[1]) >= PROMPT - 1).expand(2, -1)
    with torch.no_grad():
        reference = model(inputs).logits
    optimiser = torch.optim.AdamW(edited.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(STEPS):
        logits = edited(inputs if method == "DPO" else inputs[:1]).logits
        if torch.equal(logits[:1, PROMPT - 1 :].argmax(-1), new):
            break
        if method == "KDPO":
            loss = kdpo_loss(logits, reference[:1], labels[:1], mask[:1], beta=BETA).losses
        elif method == "DPO":
            policy, former = (sequence_logps(x, labels, mask) for x in (logits, reference))
            loss = dpo_loss(policy[:1], policy[1:], former[:1], former[1:], beta=BETA).losses
        else:
            loss = -sequence_logps(logits, labels[:1], mask[:1])
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    return edited


def draw(outcome: Outcome) -> Figure:
    """Divergence on other texts, a point an edit; edits that failed are hollow."""
    figure, (axis,) = panels(1, width=6)
    for place, name in enumerate(METHODS):
        moved, success = outcome.series[f"divergence, {name}"], outcome.series[f"success, {name}"]
        for i, (value, made) in enumerate(zip(moved, success, strict=True)):
            x = place + 0.3 * ((i + 0.5) / len(moved) - 0.5)
            axis.plot([x], [value], "o", color=f"C{place}", markersize=5, fillstyle="full" if made else "none")
    axis.set_xticks(
        range(len(METHODS)), [f"{n}\n{sum(outcome.series[f'success, {n}']):.0f} edits made" for n in METHODS]
    )
    axis.set_ylim(bottom=0)
    axis.set(title="What an edit does to other texts", ylabel="KL from before the edit (nats per byte)")
    axis.annotate("hollow: edit not made", (0.02, 0.93), xycoords="axes fraction", color="0.3")
    return figure
