"""Do digits that know their place in their number make addition work for longer numbers than were trained on?

A small decoder learns to add numbers of up to N digits, written backwards, and is asked about longer ones: with Abacus
embeddings, with learned absolute positions, with RoPE, and without positions; all else is equal. An answer counts if
it is right as a whole, its end included.
Quick: up to 3 digits, one block of width 32, 800 updates of 64 problems, 3 seeds, about a minute. Full: up to 10
digits, two blocks of width 128, 10,000 updates, offsets up to 30, 5 seeds, hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.abacus_embeddings import AbacusEmbedding
from mlreviews.datasets import ADDITION_IDS, addition_problems, answer_loss, exact_match
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2405.17399"
VARIANTS = ("Abacus", "learned absolute", "RoPE", "no positions")


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment.

    Attributes:
        digits: of the longest operands in training; both operands have the same number.
        lengths: digits of the operands in the tests.
        config: of the model.
        max_offset: k_max; the embeddings of places up to ``digits + 1 + max_offset`` are trained.
        updates: with 64 problems each.
        rate: the highest step size.
        seeds: models of each kind.
    """

    digits: int
    lengths: tuple[int, ...]
    config: TinyLMConfig
    max_offset: int
    updates: int
    rate: float
    seeds: int


def _config(d_model: int, layers: int) -> TinyLMConfig:
    return TinyLMConfig(vocab_size=len(ADDITION_IDS), d_model=d_model, layers=layers, heads=4, hidden=2 * d_model)


QUICK = Scale(3, (1, 2, 3, 4, 5, 6), _config(32, 1), 3, 800, 1e-2, 3)
FULL = Scale(10, (1, 3, 5, 8, 10, 11, 12, 14, 17, 20, 25, 30, 35), _config(128, 2), 30, 10_000, 2e-3, 5)


class AbsolutePositions(nn.Module):
    """A learned vector for each place in the row, as a position embedding of `TinyLM` that is never cut.

    Args:
        rows: of the table.
        dim: size of a token's vector.
        generator: draws the table.
    """

    def __init__(self, rows: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, dim, generator=generator) * dim**-0.5)

    def forward(self, ids: Tensor, state: None) -> tuple[Tensor, None]:
        """The vectors of the first places, for each row of the batch."""
        return self.table[: ids.shape[1]].expand(len(ids), -1, -1), None


def run(settings: Settings) -> Outcome:
    """Trains all kinds of models on problems of the same lengths, and tests them on shorter and longer ones."""
    scale = FULL if settings.full else QUICK
    whole: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    single: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    agreement = []
    runs = [(seed, name) for seed in range(scale.seeds) for name in VARIANTS]
    for seed, name in settings.track(runs, "models"):
        generator = settings.generator(seed)
        model = _model(name, scale, generator).to(settings.device)
        _train(model, scale, generator)
        tests = [_problems(torch.full((256,), n), generator, settings.device) for n in scale.lengths]
        found = [_answers(model, ids) for ids in tests]
        whole[name].append([float(right.double().mean()) for right, _ in found])
        single[name].append([share for _, share in found])
        if name == "Abacus":
            place = scale.lengths.index(scale.digits) + 1
            decoded = _decoded(model, tests[place], scale.lengths[place])
            agreement.append(float((decoded == found[place][0]).double().mean()))
    series = {"digits": [float(n) for n in scale.lengths], "longest trained": [float(scale.digits)]}
    for name in VARIANTS:
        series[f"exact match, {name}"] = torch.tensor(whole[name]).mean(0).tolist()
        series[f"digits right, {name}"] = torch.tensor(single[name]).mean(0).tolist()
    return Outcome(_claims(scale, whole, single, agreement), series)


def _model(name: str, scale: Scale, generator: torch.Generator) -> TinyLM:
    width, longest = scale.config.d_model, max(scale.lengths)
    positions: nn.Module | None = None
    if name == "Abacus":
        rows = max(longest, scale.digits + scale.max_offset) + 2
        positions = AbacusEmbedding(range(10), width, max_length=rows, max_offset=scale.max_offset, generator=generator)
    elif name == "learned absolute":
        positions = AbsolutePositions(3 * longest + 4, width, generator)
    attention = partial(CausalAttention, rope_base=10000.0 if name == "RoPE" else None)
    return TinyLM(scale.config, attention, position_embedding=positions, generator=generator)


def _problems(digits: Tensor, generator: torch.Generator, device: str) -> Tensor:
    return addition_problems(digits[:, None].expand(-1, 2), generator=generator).to(device)


def _train(model: TinyLM, scale: Scale, generator: torch.Generator) -> None:
    device = model.embed_tokens.weight.device.type

    def loss() -> Tensor:
        digits = torch.randint(1, scale.digits + 1, (64,), generator=generator)
        ids = _problems(digits, generator, device)
        return answer_loss(model(ids[:, :-1]).logits, ids)

    for _ in training(model, loss, scale.updates, scale.rate):
        pass
    model.eval()


@torch.no_grad()
def _answers(model: TinyLM, ids: Tensor) -> tuple[Tensor, float]:
    """Which answers are right as a whole, and which share of their ids is after right beginnings."""
    logits = model(ids[:, :-1]).logits
    asked = (ids == ADDITION_IDS.index("=")).cumsum(1)[:, :-1].bool() & (ids[:, 1:] != ADDITION_IDS.index(" "))
    return exact_match(logits, ids), float((logits.argmax(-1) == ids[:, 1:])[asked].double().mean())


@torch.no_grad()
def _decoded(model: TinyLM, ids: Tensor, digits: int) -> Tensor:
    """Which answers are right when they are decoded greedily with the cache."""
    prompt = 2 * digits + 2
    out, found = model(ids[:, :prompt]), []
    for _ in range(ids.shape[1] - prompt):
        found.append(out.logits[:, -1:].argmax(-1))
        out = model(found[-1], out.cache)
    wrong = torch.cat(found, 1) != ids[:, prompt:]
    return ~(wrong & (ids[:, prompt:] != ADDITION_IDS.index(" "))).any(1)


def _claims(
    scale: Scale, whole: dict[str, list[list[float]]], single: dict[str, list[list[float]]], agreement: list[float]
) -> list[Claim]:
    trained = scale.lengths.index(scale.digits)
    beyond = slice(trained + 1, None)
    far = scale.lengths.index(2 * scale.digits)

    def behind(rows: dict[str, list[list[float]]], name: str, places: slice) -> list[float]:
        pairs = zip(rows["Abacus"], rows[name], strict=True)
        return [100 * (sum(a[places]) - sum(b[places])) / len(a[places]) for a, b in pairs]

    longer = f"longer than the {scale.digits} digits of the training"
    return [
        measure(
            f"With Abacus embeddings numbers of {scale.digits} digits, the longest trained, are added (exact match)",
            f"{PAPER}, figure 1",
            [row[trained] for row in whole["Abacus"]],
            at_least=0.9,
        ),
        measure(
            f"... and numbers of {scale.lengths[far]} digits almost as well (exact match)",
            f"{PAPER}, figure 1",
            [row[far] for row in whole["Abacus"]],
            at_least=0.9,
        ),
        measure(
            f"More sums of {scale.lengths[far]} digits are right than with learned absolute positions (exact match)",
            f"{PAPER}, section 2",
            behind(whole, "learned absolute", slice(far, far + 1)),
            unit="percentage points",
            at_least=1,
        ),
        *(
            measure(
                f"Of numbers {longer}, more sums are right than with {name} (exact match)",
                f"{PAPER}, figure 1",
                behind(whole, name, beyond),
                unit="percentage points",
                at_least=1,
            )
            for name in ("RoPE", "no positions")
        ),
        measure(
            f"Of numbers {longer}, more digits of the sum are right than with learned absolute positions",
            f"{PAPER}, section 2",
            behind(single, "learned absolute", beyond),
            unit="percentage points",
            at_least=1,
        ),
        measure(
            "Decoding with the cache gives the answers that one pass says (share of the same verdicts)",
            "equation 2 of the card",
            min(agreement),
            at_least=1,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Whole answers and single digits that are right, against the length of the operands."""
    figure, axes = panels(2)
    series = outcome.series
    kinds = ("exact match", "digits right")
    for axis, kind, title in zip(axes, kinds, ("Whole sums", "Each digit, the ones before given"), strict=True):
        for name, colour in zip(VARIANTS, COLOURS, strict=False):
            axis.plot(series["digits"], series[f"{kind}, {name}"], color=colour, marker="o", label=name)
        axis.axvline(series["longest trained"][0], color="0.4", linestyle=":", label="longest trained")
        axis.set(title=title, xlabel="digits of the operands", ylabel="share right", ylim=(-0.03, 1.03))
    axes[0].legend()
    return figure
