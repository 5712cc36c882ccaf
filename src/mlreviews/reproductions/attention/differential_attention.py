"""Does the difference of two softmaxes cancel noise, and does it predict text better at equal parameters?

Key retrieval: among noise there are a few facts, tokens that stand for a key and a value; then keys are asked for, and
the model names their values. Trained from the same weights on the same batches: standard attention, differential
attention, the same with the first lambda of a deep layer (0.75 instead of 0.2), and as a control without its second map
(lambda 0): half as many standard heads of twice the value size, normed. Measured at the questions: weights of attention
by their size, as shares of a query's sum; and how much of what a head reads comes from noise, where signs can cancel.
Text: byte-level language models on Python's source, standard and differential, of equal size.
Quick: 1 layer of width 32, 48 tokens of noise, 150 updates; text with 2 layers of width 48, 64 bytes, 150 updates; 3
seeds, a minute and a half. Full: 2 layers of width 64, 192 of noise, 2,000 updates; text with 4 layers of width 128,
256 bytes, 3,000 updates; 3 seeds, hours on a CPU. The paper's models are far larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlreviews.attention.differential_attention import DifferentialAttention, differential_map
from mlreviews.datasets import python_source
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from mlreviews.reproductions.attention.selective_attention import TextTask, text_loss
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.05258"
STANDARD, DIFFERENTIAL, DEEP, ONE_MAP = "standard", "differential", "deep lambda", "lambda 0 (control)"
LONGER = (1, 2, 4)  # noise in the tests, as multiples of that in training


DEPTH = 8  # lambda starts at 0.75; the mean over 28 layers is 0.72


class Deep(DifferentialAttention):
    """With the first lambda of a layer in the middle of a large model: in the first layer little is subtracted.

    Args:
        d_model: size of a token's vector.
        heads: of a standard layer.
        layer: which block of a model this is.
        options: as of `DifferentialAttention`.
    """

    def __init__(self, d_model: int, heads: int, *, layer: int = 0, **options: Any) -> None:
        super().__init__(d_model, heads, layer=layer + DEPTH, **options)


class OneMap(DifferentialAttention):
    """Without the second map: what else differs from standard attention, half the heads and the norm, stays."""

    @property
    def lam(self) -> Tensor:
        """Always 0, with gradients of 0."""
        return 0.0 * super().lam


KINDS: dict[str, type[CausalAttention]] = {
    STANDARD: CausalAttention,
    DIFFERENTIAL: DifferentialAttention,
    DEEP: Deep,
    ONE_MAP: OneMap,
}


@dataclass(frozen=True)
class Retrieval:
    """Facts among noise, and questions at the end.

    Attributes:
        noise: tokens that mean nothing.
        keys: that there are.
        values: that a key can have, at random in every sequence.
        facts: in a sequence, of different keys.
        asked: how many of their keys are asked for, one after another.
        noises: kinds of noise.
    """

    noise: int
    keys: int = 16
    values: int = 8
    facts: int = 6
    asked: int = 4
    noises: int = 32

    @property
    def vocab_size(self) -> int:
        """Facts, then questions, then noise."""
        return self.keys * self.values + self.keys + self.noises

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences [batch, noise + facts + asked], answers [batch, asked], and where these stand, [batch, asked].

        Args:
            batch_size: sequences.
            generator: draws them.
        """
        length = self.noise + self.facts
        least = self.vocab_size - self.noises
        ids = torch.randint(least, self.vocab_size, (batch_size, length), generator=generator)
        places, keys = (
            torch.rand(batch_size, count, generator=generator).argsort(1)[:, : self.facts]
            for count in (length, self.keys)
        )
        values = torch.randint(self.values, keys.shape, generator=generator)
        ids.scatter_(1, places, keys * self.values + values)
        questions = self.keys * self.values + keys[:, : self.asked]
        return torch.cat([ids, questions], 1), values[:, : self.asked], places[:, : self.asked]


@dataclass(frozen=True)
class Found:
    """What a model does with one task.

    Attributes:
        accuracy: of the answers.
        answer: share of a question's attention at the fact that is asked for, mean over heads.
        noise: share at all noise together.
        read: what heads read of noise, over that and what they read of the fact (norms of weighted values).
    """

    accuracy: float
    answer: float
    noise: float
    read: float


def train_retrieval(model: TinyLM, task: Retrieval, updates: int, generator: torch.Generator) -> list[float]:
    """Trains on batches of 32; the losses in the course of it, each a mean over a tenth of the updates.

    Args:
        model: a language model.
        task: what is asked.
        updates: of the weights.
        generator: draws the sequences.
    """
    losses: list[float] = []
    device = model.embed_tokens.weight.device

    def loss() -> Tensor:
        ids, answers, _ = (x.to(device) for x in task.draw(32, generator))
        logits = model(ids).logits[:, -task.asked :, : task.values]
        found = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        losses.append(float(found.detach()))
        return found

    for _ in training(model, loss, updates, 0.01):
        pass
    return torch.tensor(losses).reshape(10, -1).mean(1).tolist()


@torch.no_grad()
def tested_retrieval(model: TinyLM, task: Retrieval, generator: torch.Generator) -> Found:
    """Accuracy, and where the questions attend in that layer which attends most to the answers.

    Args:
        model: a trained one.
        task: what is asked.
        generator: draws 256 sequences.
    """
    ids, answers, places = (x.to(model.embed_tokens.weight.device) for x in task.draw(256, generator))
    out = model(ids, hidden_states=True)
    accuracy = (out.logits[:, -task.asked :, : task.values].argmax(-1) == answers).float().mean()
    is_noise = ids >= task.vocab_size - task.noises
    found = []
    for block, hidden in zip(model.layers, out.hidden_states or (), strict=False):
        weights, values = _weights_and_values(block.self_attn, block.input_layernorm(hidden))  # type: ignore[operator, arg-type]
        weights = weights[:, :, -task.asked :]
        where = places[:, None, :, None].expand(-1, weights.shape[1], -1, 1)
        of_answer = torch.einsum("bhq,bhqd->bhqd", weights.gather(3, where)[..., 0], _at(values, places)).norm(dim=-1)
        of_noise = torch.einsum("bhqt,bthd->bhqd", weights * is_noise[:, None, None], values).norm(dim=-1)
        shares = weights.abs() / weights.abs().sum(-1, keepdim=True)
        at_noise = (shares * is_noise[:, None, None]).sum(-1)
        means = (x.mean().item() for x in (shares.gather(3, where), at_noise, of_noise / (of_noise + of_answer)))
        found.append(tuple(means))
    return Found(float(accuracy), *max(found))


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[batch, time, heads, dim] at places [batch, asked] -> [batch, heads, asked, dim]."""
    return values[torch.arange(len(values), device=values.device)[:, None], places].transpose(1, 2)


def _weights_and_values(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, heads, time, time] and [batch, time, heads, value_dim]."""
    assert isinstance(layer, CausalAttention)
    q, k, v = layer.project(x, 0)
    if isinstance(layer, DifferentialAttention):
        return layer.maps(x), v.unflatten(2, (-1, 2)).flatten(3)
    return differential_map(q, k, q, k, 0.0), v


def run(settings: Settings) -> Outcome:
    """Trains on retrieval and on text, with several seeds."""
    task, updates = (Retrieval(192), 2000) if settings.full else (Retrieval(48), 150)
    sizes = {"d_model": 64, "layers": 2} if settings.full else {"d_model": 32, "layers": 1}
    config = TinyLMConfig(vocab_size=task.vocab_size, tied=False, **sizes)
    curves: dict[str, list[list[float]]] = {name: [] for name in KINDS}
    tests: dict[str, list[list[Found]]] = {name: [] for name in KINDS}
    lambdas = []
    for seed, name in settings.track([(seed, name) for seed in range(3) for name in KINDS], "retrieval"):
        model = TinyLM(config, KINDS[name], generator=settings.generator(seed)).to(settings.device)
        curves[name].append(train_retrieval(model, task, updates, settings.generator(100 + seed)))
        longer = [Retrieval(times * task.noise) for times in LONGER]
        tests[name].append([tested_retrieval(model, one, settings.generator(200 + seed)) for one in longer])
        if name == DIFFERENTIAL:
            lambdas.append([float(m.lam.detach()) for m in model.modules() if isinstance(m, DifferentialAttention)])
    kinds = ((STANDARD, CausalAttention), (DIFFERENTIAL, DifferentialAttention))
    text = {
        name: [_text(settings, kind, seed) for seed in settings.track(range(3), f"text, {name}")]
        for name, kind in kinds
    }
    series: dict[str, list[float]] = {"updates": [updates * (i + 0.5) / 10 for i in range(10)]}
    for name in KINDS:
        series[f"retrieval loss, {name}"] = torch.tensor(curves[name]).mean(0).tolist()
        for what in ("accuracy", "answer", "noise", "read"):
            values = torch.tensor([[getattr(found, what) for found in row] for row in tests[name]])
            series[f"{what}, {name}"] = values.mean(0).tolist()
            series[f"{what} of each seed, {name}"] = values[:, 0].tolist()
    series["noise in the test"] = [float(times * task.noise) for times in LONGER]
    series |= {f"text loss, {name}": losses for name, losses in text.items()}
    series |= {f"lambda, layer {i}": list(values) for i, values in enumerate(zip(*lambdas, strict=True))}
    return Outcome(_claims(tests, text), series)


def _text(settings: Settings, kind: type[CausalAttention], seed: int) -> float:
    corpus = python_source()
    if settings.full:
        task, config = (
            TextTask(corpus, 256, 16, 3000, 0.003, settings.device),
            TinyLMConfig(d_model=128, layers=4, heads=8),
        )
    else:
        task, config = TextTask(corpus, 64, 8, 150, 0.01, settings.device), TinyLMConfig(d_model=48, layers=2, heads=8)
    model = TinyLM(config, kind, generator=settings.generator(seed)).to(settings.device)
    task.train(model, settings.generator(300 + seed))
    return text_loss(model, task.held_out(32 if settings.full else 8, settings.generator(50)))


def _claims(tests: dict[str, list[list[Found]]], text: dict[str, list[float]]) -> list[Claim]:
    def gain(what: str, other: str, one: str = DIFFERENTIAL) -> list[float]:
        pairs = zip(tests[one], tests[other], strict=True)
        return [getattr(one[0], what) - getattr(two[0], what) for one, two in pairs]

    return [
        measure(
            "Differential attention gives the answer a larger share than standard attention (difference)",
            f"{PAPER}, abstract",
            gain("answer", STANDARD),
            at_least=0.0,
        ),
        measure("... and noise a smaller one (difference)", f"{PAPER}, abstract", gain("noise", STANDARD), at_most=0.0),
        measure(
            "Less of what its heads read comes from noise (difference of shares)",
            f"{PAPER}, abstract",
            gain("read", STANDARD),
            at_most=0.0,
        ),
        measure(
            "It retrieves keys more accurately (difference of accuracies)",
            f"{PAPER}, abstract",
            gain("accuracy", STANDARD),
            at_least=0.0,
        ),
        measure(
            "The second map is why: without it the answer's share is smaller (difference)",
            "ours",
            gain("answer", ONE_MAP),
            at_least=0.0,
        ),
        measure("... more is read from noise (difference)", "ours", gain("read", ONE_MAP), at_most=0.0),
        measure("... and the accuracy is lower (difference)", "ours", gain("accuracy", ONE_MAP), at_least=0.0),
        measure(
            "With the lambda of a deep layer, less is read from noise than without the second map (difference)",
            "ours",
            gain("read", ONE_MAP, DEEP),
            at_most=0.0,
        ),
        measure(
            "It predicts text better with as many parameters (its loss minus the standard one)",
            f"{PAPER}, abstract",
            [one - other for one, other in zip(text[DIFFERENTIAL], text[STANDARD], strict=True)],
            at_most=0.0,
            unit="nats a byte",
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Retrieval in the course of training and with more noise, shares of attention, and text."""
    figure, (curves, accuracy, shares, noise_shares, read, text) = panels(3, 2, width=4.2)
    series = outcome.series
    noise = series["noise in the test"]
    tests = {"accuracy": accuracy, "answer": shares, "noise": noise_shares, "read": read}
    for colour, name in zip(COLOURS, KINDS, strict=False):
        curves.plot(series["updates"], series[f"retrieval loss, {name}"], marker=".", color=colour, label=name)
        for what, axis in tests.items():
            axis.plot(noise, series[f"{what}, {name}"], marker="o", color=colour, label=name)
    curves.set(title="Learning to retrieve", xlabel="updates", ylabel="loss, nats an answer")
    accuracy.set(title="Answers", ylabel="accuracy")
    shares.set(title="Attention at the answer", ylabel="share of absolute weights")
    noise_shares.set(title="Attention at noise", ylabel="share of absolute weights")
    read.set(title="What heads read of noise", ylabel="share of weighted values")
    for axis in tests.values():
        axis.set_ylim(0, 1.03)
        axis.set_xscale("log", base=2)
        axis.set_xticks(noise, [f"{n:g}" for n in noise])
        axis.set_xlabel(f"tokens of noise (training: {noise[0]:g})")
    curves.legend()
    for place, name in enumerate((STANDARD, DIFFERENTIAL)):
        losses = series[f"text loss, {name}"]
        text.plot(losses, [place] * len(losses), "o", color=COLOURS[place], alpha=0.8)
    text.set_yticks((0, 1), (STANDARD, DIFFERENTIAL))
    text.set_ylim(1.5, -0.5)
    text.set(title="Python's source, each seed", xlabel="loss, nats a byte")
    return figure
