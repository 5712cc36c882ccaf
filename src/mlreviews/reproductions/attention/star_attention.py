"""What does a model trained with full attention lose when its context is encoded in blocks, with and without an anchor?

A small language model is trained with full attention on bytes of Python's own source in which needles are strewn,
tokens that stand for a key with a value; behind the text, keys are asked for. The same weights then read their context
by star attention, for blocks of several sizes: how many needles are found, and how well is text predicted that follows?
Time is that of one layer's attention on one host: no gain of sharing the blocks among hosts is in it. The paper's
models (Llama) and tasks (RULER, of which needles are one kind) are out of reach here; and models as small as these have
no attention sink at the beginning, which is what the paper needs the anchor for.
Quick: contexts of 96 bytes, 3 models of 150 updates, half a minute. Full: 512 bytes, 5 models of 2,000 updates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.star_attention import StarAttention, end_context, star_attention
from mlreviews.datasets import python_source
from mlreviews.models import CausalAttention, LMCache, TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews_kernels.attention import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2411.17116"
SHARES = (2, 4, 8, 16)  # blocks in a context
KEYS, VALUES = 4, 8  # needles in a context, and what each may stand for
FIRST = 257  # ids before it are bytes and the end of a file; then needles, and then the keys alone


def run(settings: Settings) -> Outcome:
    """Trains models with full attention and measures what star attention makes of their contexts."""
    context, updates, seeds, size = (512, 2000, 5, (128, 4)) if settings.full else (96, 150, 3, (64, 2))
    config = TinyLMConfig(FIRST + KEYS * (VALUES + 1), size[0], size[1], heads=4, kv_heads=2)
    rise: dict[str, list[list[float]]] = {"anchor": [], "no anchor": []}
    recall: dict[str, list[list[float]]] = {"anchor": [], "no anchor": []}
    surprise, full, found, exact, drift, sink = [], [], [], [], [], []
    for seed in settings.track(range(seeds), "models"):
        generator = settings.generator(seed)
        model = _trained(config, context, updates, generator, settings.device)
        text = next(python_source().validation.batches(context + context // 2, 32, generator)).to(settings.device)
        needles = [x.to(settings.device) for x in next(_needles(context, 128, generator, train=False))]
        loss, logits, values = _text(model, text, context)
        sink.append(_sink(model, text[:, :context]) * context)
        accuracy, _ = _recall(model, *needles)
        full.append(loss)
        found.append(accuracy)
        for name in rise:
            stars = [_star(model, config, context // share, name == "anchor") for share in SHARES]
            rise[name].append([_text(star, text, context)[0] - loss for star in stars])
            recalls = [_recall(star, *needles) for star in stars]
            recall[name].append([share for share, _ in recalls])
            if name == "anchor":
                exact.append(float((_text(stars[0], text, context)[1] - logits).abs().max()))
                drift.append(float((_text(stars[1], text, context)[2] - values).norm() / values.norm()))
                surprise.append(recalls[3][1] - recalls[1][1])
    times = _times(4096 if settings.full else 2048, settings)
    claims = [
        measure(
            "A context of two blocks is encoded exactly (largest difference of the query's logits)",
            "equation 1 of the card",
            max(exact),
            at_most=1e-3,
        ),
        measure(
            "... and one of four is not (relative error of the last layer's values)",
            "equation 1 of the card",
            min(drift),
            at_least=1e-3,
        ),
        measure(
            "With blocks of a quarter of the context, nearly as many needles are found (share of full attention's)",
            f"{PAPER}, abstract",
            [recalls[1] / accuracy for recalls, accuracy in zip(recall["anchor"], found, strict=True)],
            at_least=0.95,
        ),
        measure(
            "... and the loss of the text behind the context rises by 5 % at most",
            f"{PAPER}, abstract",
            [100 * rises[1] / loss for rises, loss in zip(rise["anchor"], full, strict=True)],
            unit="%",
            at_most=5,
        ),
        measure(
            "The models have an attention sink for the anchor to take up (attention to byte 1, times its share)",
            f"{PAPER}, section on anchor blocks",
            sink,
            at_least=10,
        ),
        measure(
            "Without the anchor fewer needles are found (blocks of a quarter)",
            f"{PAPER}, section on anchor blocks; review of 2025-03-24",
            [100 * (a[1] - b[1]) for a, b in zip(recall["anchor"], recall["no anchor"], strict=True)],
            unit="percentage points",
            at_least=1,
        ),
        measure(
            "... and the loss of the text rises more",
            f"{PAPER}, section on anchor blocks; review of 2025-03-24",
            [b[1] - a[1] for a, b in zip(rise["anchor"], rise["no anchor"], strict=True)],
            unit="nats a byte",
            at_least=0,
        ),
        measure(
            "The smaller the blocks, the less sure of its needles the model is (a sixteenth less a quarter)",
            f"{PAPER}, section on the block size",
            surprise,
            unit="nats a needle",
            at_least=0,
        ),
        measure(
            "On one host, phase 1 takes less time than full attention (times, blocks of an eighth)",
            f"{PAPER}, complexity of phase 1",
            times[8],
            at_least=1,
        ),
    ]
    series: dict[str, list[float]] = {"blocks in the context": list(map(float, SHARES))}
    for what, runs in (("rise of the loss", rise), ("needles found", recall)):
        for name, models in runs.items():
            series[f"{what}, {name}"] = torch.tensor(models).mean(0).tolist()
            series |= {f"{what}, {name}, model {i}": found_by for i, found_by in enumerate(models)}
    series |= {"loss after full attention": full, "needles found by full attention": found}
    series["times as quick"] = [statistics.median(times[share]) for share in SHARES]
    return Outcome(claims, series)


def _needles(
    context: int, batch_size: int, generator: torch.Generator, *, train: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Text with needles and the keys behind it, in random order, [batch, context + keys]; and the keys' values."""
    corpus = python_source()
    for text in (corpus.train if train else corpus.validation).batches(context - 1, batch_size, generator):
        values = torch.randint(VALUES, (batch_size, KEYS), generator=generator)
        places = torch.rand(text.shape, generator=generator).topk(KEYS).indices
        ids = text.clamp(max=FIRST - 1).scatter(1, places, FIRST + torch.arange(KEYS) * VALUES + values)
        order = torch.rand(batch_size, KEYS, generator=generator).argsort(1)
        yield torch.cat([ids, FIRST + KEYS * VALUES + order], 1), values.gather(1, order)


def _trained(config: TinyLMConfig, context: int, updates: int, generator: torch.Generator, device: str) -> TinyLM:
    model = TinyLM(config, CausalAttention, generator=generator).to(device)
    data = _needles(context, 12, generator, train=True)

    def loss() -> Tensor:
        ids, values = (x.to(device) for x in next(data))
        logits = model(ids).logits
        text = nn.functional.cross_entropy(logits[:, : context - 1].flatten(0, 1), ids[:, 1:context].flatten())
        return nn.functional.cross_entropy(logits[:, context:, :VALUES].flatten(0, 1), values.flatten()) + 0.2 * text

    for _ in training(model, loss, updates, 1e-2):
        pass
    return model.eval()


def _star(model: TinyLM, config: TinyLMConfig, block_size: int, anchor: bool) -> TinyLM:
    """The same weights with star attention."""
    kind = partial(StarAttention, block_size=block_size, anchor_size=None if anchor else 0)
    found = TinyLM(config, kind, generator=torch.Generator())
    found.load_state_dict(model.state_dict())
    return found.to(model.lm_head.weight.device).eval()


def _read(model: TinyLM, ids: Tensor) -> LMCache:
    """The model's cache of a context, in phase 2 where it has star attention."""
    cache = model(ids).cache
    return end_context(cache) if isinstance(model.layers[0].self_attn, StarAttention) else cache


@torch.no_grad()
def _text(model: TinyLM, window: Tensor, context: int) -> tuple[float, Tensor, Tensor]:
    """Loss and logits of the text behind the context, and the last layer's values of the context."""
    cache = _read(model, window[:, :context])
    logits = model(window[:, context:-1], cache).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, context + 1 :].flatten())
    return float(loss), logits, cache.layers[-1].values


@torch.no_grad()
def _recall(model: TinyLM, ids: Tensor, values: Tensor) -> tuple[float, float]:
    """Share of the needles that are found, and the loss in nats a needle."""
    logits = model(ids[:, -KEYS:], _read(model, ids[:, :-KEYS])).logits[..., :VALUES]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), values.flatten())
    return float((logits.argmax(-1) == values).double().mean()), float(loss)


@torch.no_grad()
def _sink(model: TinyLM, ids: Tensor) -> float:
    """The attention that the last byte gives to the first, a mean over layers, heads and rows."""
    states = model(ids, hidden_states=True).hidden_states or ()
    shares = []
    for block, x in zip(model.layers, states, strict=False):
        q, k, v = block.self_attn.project(block.input_layernorm(x), 0)  # type: ignore[operator,union-attr]
        first, every = (attention(q[:, -1:], k[:, :n], v[:, :n])[1] for n in (1, ids.shape[1]))
        shares.append((first - every).exp().mean())
    return float(torch.stack(shares).mean())


@torch.no_grad()
def _times(length: int, settings: Settings) -> dict[int, list[float]]:
    """How many times as quick phase 1 is as full attention, by blocks in the context; each of 5 in turn with it."""
    generator = settings.generator(99)
    q, k, v = (torch.randn(1, length, 4, 32, generator=generator).to(settings.device) for _ in range(3))

    def seconds(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        if settings.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    found: dict[int, list[float]] = {share: [] for share in SHARES}
    for turn in range(6):
        for share, ratios in found.items():
            ratio = seconds(partial(attention, q, k, v)) / seconds(partial(star_attention, q, k, v, length // share))
            if turn:  # the first one warms up
                ratios.append(ratio)
    return found


def draw(outcome: Outcome) -> Figure:
    """Needles found, the rise of the loss, and the gain in time, against the number of blocks."""
    figure, axes = panels(3, width=4.2)
    series = outcome.series
    blocks = series["blocks in the context"]
    for axis, what in zip(axes, ("needles found", "rise of the loss"), strict=False):
        for name, colour in (("anchor", COLOURS[0]), ("no anchor", COLOURS[1])):
            for key, values in series.items():
                if key.startswith(f"{what}, {name}, model"):
                    axis.plot(blocks, values, ".", color=colour, alpha=0.5)
            label = "with the anchor" if name == "anchor" else "without"
            axis.plot(blocks, series[f"{what}, {name}"], color=colour, label=label)
    accuracy = statistics.fmean(series["needles found by full attention"])
    axes[0].axhline(accuracy, color="0.4", linestyle=":", label="full attention")
    axes[0].set(title="Needles in the context", ylabel="share found (points: models)", ylim=(0, 1.03))
    axes[1].axhline(0, color="0.4", linestyle=":")
    axes[1].set(title="Text behind the context", ylabel="rise of the loss (nats a byte)")
    axes[2].plot(blocks, series["times as quick"], marker="o", label="measured")
    axes[2].plot(blocks, [b * b / (3 * b - 2) for b in blocks], "--", color="0.4", label="by pairs of tokens")
    axes[2].set(title="Phase 1 on one host", ylabel="times as quick as full attention")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("blocks in the context")
        axis.legend()
    return figure
