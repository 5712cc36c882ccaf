"""Where does Jacobi's iteration save sequential steps, and is its result the sequential one?

Three triangular systems. Images of digits are drawn, black or white, pixel by pixel from a masked autoencoder (MADE)
that was trained on them, with the noise of each pixel drawn beforehand. The states of a tanh network are computed over
a sequence, to 1e-6, for several sizes of its recurrent matrix. Text is decoded by the shipped model of Python source,
greedily and drawn with noise that is drawn beforehand. The sequential way takes one step an unknown.
Quick: 4 MADEs of 64 pixels, 4 networks over 128 steps, 6 groups of 2 prompts with 40 tokens (3 groups left the claims
about text open). Full: 8 MADEs trained longer, 10 networks over 1,024 steps, 10 groups of 20 prompts with 200 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import digits, python_source
from mlreviews.decoding.jacobi_decoding import gs_jacobi_solve, jacobi_decode, jacobi_gs_solve, jacobi_solve
from mlreviews.models import GenerationResult, Sampler, load_pretrained
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2002.03629"
TEXT = "arXiv:2305.10427"
PIXELS = 64
BLOCK = 8  # of pixels: a row of the image
RADII = (0.5, 0.8, 0.95, 1.1)  # spectral norms of the recurrent matrix
TOKENS = 16  # of a block of text
PROMPT = 128

Step = Callable[[Tensor], Tensor]


def run(settings: Settings) -> Outcome:
    """Counts steps in the three systems and compares the solutions."""
    images = _images(settings)
    states = _states(settings)
    text = _text(settings)
    series = {**images, **states, **text, "radii": list(RADII)}
    claims = [
        measure(
            "The solution is the sequential one: the same pixels (share of images)",
            f"{PAPER}, proposition 1",
            min(images["images that agree"]),
            at_least=1,
        ),
        measure(
            "... and the same text, greedy and drawn with the same noise (share of texts)",
            f"{PAPER}, proposition 1",
            min(text["texts that agree"]),
            at_least=1,
        ),
        measure(
            "MADE's images need several times fewer iterations than they have pixels (pixels over iterations)",
            f"{PAPER}: 2.1 to 26 in all its experiments",
            [PIXELS / n for n in images["iterations, Jacobi"]],
            at_least=2.1,
        ),
        measure(
            "Recurrent networks that forget are computed in fewer iterations than steps (steps over iterations, norm "
            f"{RADII[1]})",
            f"{PAPER}: 2.1 to 26 in all its experiments",
            states[f"speed-up, norm {RADII[1]}"],
            at_least=2.1,
        ),
        measure(
            "Greedy text takes fewer passes than tokens (tokens a pass, blocks of 16)",
            f"{TEXT}: up to 1.38 times in translation",
            text["tokens a pass, greedy"],
            at_least=1.05,
        ),
        measure(
            "Drawn text saves no more than greedy text (tokens a pass, difference)",
            "ours",
            [a - b for a, b in zip(text["tokens a pass, drawn"], text["tokens a pass, greedy"], strict=True)],
            at_most=0.0,
        ),
    ]
    return Outcome(claims, series)


class _MADE(nn.Module):
    """A layer of masked units: logits of each pixel from those before it."""

    into: Tensor
    out: Tensor

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        place, depth = torch.arange(PIXELS), torch.arange(hidden) % (PIXELS - 1)
        self.register_buffer("into", (depth[:, None] >= place).float())
        self.register_buffer("out", (place[:, None] > depth).float())
        self.first = nn.Parameter(torch.randn(hidden, PIXELS, generator=generator) / 8)
        self.last = nn.Parameter(torch.randn(PIXELS, hidden, generator=generator) / hidden**0.5)
        self.offsets = nn.ParameterList([torch.zeros(hidden), torch.zeros(PIXELS)])

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.linear(x, self.first * self.into, self.offsets[0]).relu()
        return nn.functional.linear(inner, self.last * self.out, self.offsets[1])


def _images(settings: Settings) -> dict[str, list[float]]:
    """Mean iterations of an image for each MADE, and the share of images that agree with sequential drawing."""
    models, updates, drawn = (8, 3000, 200) if settings.full else (4, 400, 25)
    data = (digits().features.float() > 7).float()
    found: dict[str, list[float]] = {}
    for seed in settings.track(range(models), "MADE"):
        generator = settings.generator(seed)
        model = _MADE(256, generator)

        def loss(model: _MADE = model, generator: torch.Generator = generator) -> Tensor:
            x = data[torch.randint(len(data), (64,), generator=generator)]
            return nn.functional.binary_cross_entropy_with_logits(model(x), x)

        losses = [value for _, value in training(model, loss, updates, 1e-2)]
        rows: dict[str, list[float]] = {}
        with torch.no_grad():
            for _ in range(drawn):
                noise = torch.rand(1, PIXELS, generator=generator)
                for name, value in _image(model, noise).items():
                    rows.setdefault(name, []).append(value)
        for name, values in rows.items():
            found.setdefault(name, []).append(sum(values) / len(values))
        found.setdefault("bits a pixel", []).append(sum(losses[-50:]) / 50 / 0.6931)
    return found


def _image(model: _MADE, noise: Tensor) -> dict[str, float]:
    def step(x: Tensor) -> Tensor:
        return (noise < model(x).sigmoid()).float()

    blank = torch.zeros(1, PIXELS)
    sequential = blank.clone()
    for pixel in range(PIXELS):
        sequential[:, pixel] = step(sequential)[:, pixel]
    jacobi, parallel = jacobi_solve(step, blank)
    mixed, passes = gs_jacobi_solve(step, blank, BLOCK)
    blocks, rounds = jacobi_gs_solve(step, blank, BLOCK)
    agree = all(torch.equal(sequential, x) for x in (jacobi, mixed, blocks))
    return {
        "images that agree": float(agree),
        "iterations, Jacobi": parallel,
        "iterations, GS-Jacobi": passes,
        "steps, Jacobi-GS": rounds * BLOCK,
    }


def _states(settings: Settings) -> dict[str, list[float]]:
    """Steps over iterations for each network, by the norm of its recurrent matrix."""
    networks, time, width = (10, 1024, 64) if settings.full else (4, 128, 32)
    found: dict[str, list[float]] = {}
    for seed in range(networks):
        generator = settings.generator(100 + seed)
        inputs = torch.randn(1, time, width, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        for radius in RADII:

            def step(h: Tensor, radius: float = radius, inputs: Tensor = inputs, turn: Tensor = turn) -> Tensor:
                before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
                return (radius * before @ turn.mT + inputs).tanh()

            _, iterations = jacobi_solve(step, torch.zeros_like(inputs), atol=1e-6)
            found.setdefault(f"speed-up, norm {radius}", []).append(time / iterations)
    return found


@torch.no_grad()
def _text(settings: Settings) -> dict[str, list[float]]:
    """Tokens a pass for each group of prompts, and the share of texts that are those of one token a pass."""
    groups, prompts, new = (10, 20, 200) if settings.full else (6, 2, 40)
    model = load_pretrained("python-target").to(settings.device)
    ways = {"greedy": Sampler(), "drawn": Sampler(temperature=1.0)}

    def decoded(ids: Tensor, way: str, block: int) -> GenerationResult:
        return jacobi_decode(
            model, ids, new, block_size=block, sampler=ways[way], generator=settings.generator(1000)
        )  # always with the same noise

    found: dict[str, list[float]] = {}
    same: list[bool] = []
    for group in settings.track(range(groups), "groups of prompts"):
        windows = python_source().validation.batches(PROMPT, prompts, settings.generator(group), within_documents=True)
        passes = dict.fromkeys(ways, 0)
        for ids in next(windows)[:, :PROMPT].to(settings.device).split(1):
            for way in ways:
                result = decoded(ids, way, TOKENS)
                passes[way] += result.target_calls
                if way == "greedy":  # each token is the most likely one after those before it
                    whole = torch.cat([ids, result.tokens], 1)
                    said = model(whole[:, :-1]).logits[:, PROMPT - 1 :].argmax(-1)
                    same.append(torch.equal(said, result.tokens))
        for way, calls in passes.items():
            found.setdefault(f"tokens a pass, {way}", []).append(prompts * new / calls)
    same.append(torch.equal(result.tokens, decoded(ids, "drawn", 1).tokens))
    return {**found, "texts that agree": [float(x) for x in same]}


def draw(outcome: Outcome) -> Figure:
    """Steps that are saved in each of the three systems."""
    figure, (images, states, text) = panels(3, width=4.2)
    series = outcome.series

    def mean(name: str) -> float:
        return sum(series[name]) / len(series[name])

    steps = {
        "one pixel\na step": float(PIXELS),
        "GS-Jacobi,\nrows": mean("iterations, GS-Jacobi"),
        "Jacobi-GS,\nrows": mean("steps, Jacobi-GS"),
        "Jacobi": mean("iterations, Jacobi"),
    }
    bars = images.barh(list(steps), list(steps.values()), color=["C6", "C2", "C1", "C0"])
    images.bar_label(bars, fmt="%.1f", padding=3)
    images.set(title="Drawing an image of 64 pixels", xlabel="sequential steps", xlim=(0, 75))
    images.invert_yaxis()
    images.grid(axis="y", visible=False)
    radii = series["radii"]
    states.plot(radii, [mean(f"speed-up, norm {radius}") for radius in radii], marker="o")
    states.set(title="States of a tanh network", xlabel="norm of its matrix", ylabel="steps over iterations")
    states.set_ylim(0)
    for place, way in enumerate(("greedy", "drawn")):
        values = series[f"tokens a pass, {way}"]
        text.plot([place] * len(values), values, marker="o", linestyle="")
    text.axhline(1, color="0.4", linestyle=":")
    text.set(title="Text, blocks of 16 tokens", ylabel="tokens a pass, by groups of prompts", ylim=(0.9, 1.6))
    text.set(xlim=(-0.7, 1.7))
    text.set_xticks([0, 1], ["greedy", "drawn"])
    return figure
