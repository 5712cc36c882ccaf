"""Does a memory of retrieved chunks bring back what local attention has lost, and does it help on real text?

Recall: sequences of chunks, each on a topic of its own and with one pair of a key and a value; at the end the topic of
one of them comes up again, and its key is asked for. The answer is out of reach of local attention. Models with two
layers are trained with and without retrieval. Text: language models read Python's source code in pieces of 128 bytes
with chunks of 16, of which two are local. Forgetting: a memory under pressure, where a part of the chunks is in use.
Quick: 150 updates of 32 sequences, 3 seeds; 60 updates on 8 pieces, 3 seeds. A minute and a half.
Full: 3,000 updates; 1,500 updates on 16 pieces of 512 bytes. An hour or so.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.memlong import ChunkMemory, MemLongAttention, retrieval_attention
from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import bits_per_byte, next_token_loss, training
from mlreviews_kernels.attention import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2408.16967"
CHUNK, CHUNKS, TOPICS, VALUES = 8, 5, 16, 8
KEY = TOPICS + VALUES  # the one id that announces a value
VARIANTS = {"local only": 0, "with memory": 2}


def run(settings: Settings) -> Outcome:
    """Trains on recall and on text, and measures exactness and forgetting."""
    recall: dict[str, list[float]] = {}
    bits: dict[str, list[float]] = {}
    for name, top_k in VARIANTS.items():
        recall[name] = [_recall(top_k, seed, settings) for seed in settings.track(range(3), f"recall, {name}")]
        bits[name] = [_text(top_k, seed, settings) for seed in settings.track(range(3), f"text, {name}")]
    used, unused = _forgetting(settings)
    series = {f"recall, {name}": found for name, found in recall.items()}
    series |= {f"bits per byte, {name}": found for name, found in bits.items()}
    claims = [
        measure(
            "A memory of all past keys under the joint softmax is full attention without positions (largest error)",
            f"{PAPER}, section 3.3",
            _exactness(settings.generator(1)),
            at_most=1e-12,
        ),
        measure(
            "What left the local context is answered with memory (accuracy; 1/8 is chance)",
            "review and paper, section 4",
            recall["with memory"],
            at_least=0.5,
        ),
        measure("... and not without (accuracy)", "ours", recall["local only"], at_most=0.2),
        measure(
            "Memory lowers the loss on text beyond the local context (bits per byte, less that without)",
            f"{PAPER}, table 1",
            [a - b for a, b in zip(bits["with memory"], bits["local only"], strict=True)],
            unit="bits per byte",
            at_most=0.0,
        ),
        measure("Under pressure chunks in use are kept (part of them)", f"{PAPER}, section 3.4", used, at_least=0.9),
        measure("... and chunks that nobody asks for go (part kept)", f"{PAPER}, section 3.4", unused, at_most=0.5),
    ]
    return Outcome(claims, series)


def sequences(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of `CHUNKS` chunks and the values asked for.

    A chunk is its topic, several times, and KEY with a value. The last chunk but one is the topic of one of the first
    ones again, without a value, and the last begins with KEY: the value of that topic is to follow.

    Args:
        batch: how many.
        generator: draws them.

    Returns:
        ids [batch, time], the last one KEY, and the values [batch].
    """
    topics = torch.rand(batch, TOPICS, generator=generator).argsort(1)[:, :CHUNKS]
    values = TOPICS + torch.randint(VALUES, (batch, CHUNKS), generator=generator)
    asked = torch.randint(CHUNKS - 3, (batch,), generator=generator)
    chunks = topics[..., None].repeat(1, 1, CHUNK)
    chunks[..., CHUNK // 2] = KEY
    chunks[..., CHUNK // 2 + 1] = values
    rows = torch.arange(batch)
    chunks[:, -2] = topics[rows, asked][:, None]
    return torch.cat([chunks[:, :-1].flatten(1), torch.full((batch, 1), KEY)], 1), values[rows, asked]


def _recall(top_k: int, seed: int, settings: Settings) -> float:
    """Accuracy on 512 sequences."""
    config = TinyLMConfig(vocab_size=KEY + 1, d_model=32, layers=2, heads=2, hidden=64)
    generator = settings.generator(100 + seed)
    mixer = partial(MemLongAttention, chunk_size=CHUNK, top_k=top_k)
    model = TinyLM(config, mixer, generator=generator).to(settings.device)

    def loss() -> Tensor:
        ids, values = (x.to(settings.device) for x in sequences(32, generator))
        return nn.functional.cross_entropy(model(ids).logits[:, -1], values)

    for _ in training(model, loss, 3000 if settings.full else 150, 0.01):
        pass
    ids, values = sequences(512, generator)
    with torch.no_grad():
        found = model(ids.to(settings.device)).logits[:, -1].argmax(-1).cpu()
    return float((found == values).double().mean())


def _text(top_k: int, seed: int, settings: Settings) -> float:
    length, batch, updates, tested = (512, 16, 1500, 500_000) if settings.full else (128, 8, 60, 33_000)
    corpus = python_source()
    config = TinyLMConfig(d_model=64, layers=2, heads=4, hidden=128)
    mixer = partial(MemLongAttention, chunk_size=16, top_k=top_k)
    model = TinyLM(config, mixer, generator=settings.generator(200 + seed)).to(settings.device)
    batches = corpus.train.batches(length, batch, settings.generator(300 + seed))
    for _ in training(model, lambda: next_token_loss(model, next(batches).to(settings.device)), updates, 0.005):
        pass
    return bits_per_byte(model, corpus.validation, length, tested)


def _exactness(generator: torch.Generator) -> float:
    q, k, v = torch.randn(3, 2, 40, 4, 8, dtype=torch.float64, generator=generator).unbind()
    whole, _ = attention(q, k, v)
    local, far = slice(25, 40), slice(0, 25)
    found = retrieval_attention(q[:, local], k[:, local], v[:, local], q[:, local], k[:, far], v[:, far])
    return float((found - whole[:, local]).abs().max())


def _forgetting(settings: Settings) -> tuple[float, float]:
    """Which part of 20 chunks that are asked for, and of 20 that are not, is left after 200 more have come."""
    generator = settings.generator(2)
    directions = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    shape = (1, 1, 1, 1)
    memory = ChunkMemory.empty(directions[:1], torch.zeros(shape), torch.zeros(shape))
    mask = torch.ones(1, 1, dtype=torch.bool)
    for i in range(240):
        content = torch.full(shape, float(i))
        memory = memory.add(directions[i : i + 1], content, content, mask, capacity=100)
        asked = directions[int(torch.randint(20, (1,), generator=generator))]
        memory = memory.search(asked[None], 1)[-1]
    left = set(memory.keys.flatten().int().tolist())
    return len(left & set(range(20))) / 20, len(left & set(range(20, 40))) / 20


def draw(outcome: Outcome) -> Figure:
    """Accuracy of recall and bits per byte, one point a seed."""
    figure, (recall, text) = panels(2)
    for axis, prefix in ((recall, "recall, "), (text, "bits per byte, ")):
        for i, (name, colour) in enumerate(zip(VARIANTS, COLOURS, strict=False)):
            found = outcome.series[prefix + name]
            axis.plot([i] * len(found), found, "o", color=colour)
        axis.set_xticks(range(len(VARIANTS)), list(VARIANTS))
        axis.set_xlim(-0.5, len(VARIANTS) - 0.5)
    recall.axhline(1 / VALUES, linestyle="--", color="#444444", label="chance")
    recall.set(title="Recall of what was read long ago", ylabel="accuracy, one point a seed", ylim=(0, 1.05))
    recall.legend()
    text.set(title="Python's source code", ylabel="bits per byte, one point a seed")
    return figure
