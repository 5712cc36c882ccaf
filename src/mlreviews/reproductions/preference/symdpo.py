"""Does a model that answers from texts and from what it knows learn to read the images of demonstrations by SymDPO?

Images are noisy vectors of 12 kinds, answers their words. A transformer of one block reads four demonstrations, each
with image, question and answer in one position, and a query. The base model is trained on two sorts of prompts: images
in words with one question throughout, where the demonstrations don't help, and demonstrations with symbols for answers
that only the questions tell apart. So it knows words, and finds answers by texts. DPO then trains it on 3000 pairs: of
SymDPO, half against the word and half against another demonstration's symbol; on either sort alone; and on pairs of
words. Tested are symbols that no training has seen, with one question and four kinds in the demonstrations, the query's
among them, so that chance is 1/4. Tokens are fixed random vectors for inputs and outputs.
A base without the prompts that texts decide, which had nothing to build on, learnt nothing from the same pairs. Steps
and rate were chosen on seeds that are not used here.
Quick: 4 seeds, 150 steps on 64 pairs. Full: 20 seeds, 1000 steps.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.symdpo import Demonstration, SymbolPair, symbol_against_symbol, symbol_against_word
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2411.11909"
KINDS, PIXELS, WIDTH, SHOTS, NOISE = 12, 16, 32, 4, 1.0
SEEN, UNSEEN, PAIRS, BATCH, BASE_STEPS, PROMPTS, RATE = 200, 50, 3000, 64, 400, 1000, 3e-3
QUESTIONS = [f"question {i}" for i in range(20)]
WORDS = [f"word {i}" for i in range(KINDS)]
SYMBOLS = [f"@{i}" for i in range(SEEN + UNSEEN)]
IDS = {token: i for i, token in enumerate([*WORDS, *SYMBOLS])}
BASE, GENERAL, AGAINST_WORD, AGAINST_SYMBOL, SYMDPO = (
    "base",
    "DPO on words",
    "SymDPO, against the word only",
    "SymDPO, against symbols only",
    "SymDPO",
)
MODELS = (BASE, GENERAL, AGAINST_WORD, AGAINST_SYMBOL, SYMDPO)
Make = Callable[[list[Demonstration], Demonstration], SymbolPair]


class Batch(NamedTuple):
    """Prompts as tensors.

    Attributes:
        images: [batch, shots, pixels], of the demonstrations.
        questions: [batch, shots], of the demonstrations.
        answers: [batch, shots], ids of their answers.
        query: [batch, pixels], image.
        question: [batch], of the query.
        chosen: [batch], id.
        rejected: [batch], id.
    """

    images: Tensor
    questions: Tensor
    answers: Tensor
    query: Tensor
    question: Tensor
    chosen: Tensor
    rejected: Tensor


class World:
    """Kinds of images."""

    def __init__(self, generator: torch.Generator) -> None:
        self.kinds = torch.randn(KINDS, PIXELS, generator=generator)

    def image(self, kind: Tensor, generator: torch.Generator) -> Tensor:
        """Images of kinds [...], [..., pixels]."""
        return self.kinds[kind] + NOISE * torch.randn(*kind.shape, PIXELS, generator=generator)

    def pairs(self, make: Make, count: int, generator: torch.Generator) -> Batch:
        """Prompts of four kinds in words with a query of one of these, and what is made of them."""
        kinds = torch.rand(count, KINDS, generator=generator).argsort(1)[:, :SHOTS]
        places = torch.randint(SHOTS, (count, 1), generator=generator)
        kinds = torch.cat([kinds, kinds.gather(1, places)], 1)
        images = self.image(kinds, generator)
        questions = torch.randint(len(QUESTIONS), (count,), generator=generator)  # the same for a whole prompt
        answers, chosen, rejected = [], [], []
        for row, question in zip(kinds.tolist(), questions.tolist(), strict=True):
            shown = [Demonstration(place, QUESTIONS[question], WORDS[kind]) for place, kind in enumerate(row)]
            pair = make(shown[:-1], shown[-1])
            answers.append([IDS[demo.answer] for demo in pair.demonstrations])
            chosen.append(IDS[pair.chosen])
            rejected.append(IDS[pair.rejected])
        before = questions[:, None].expand(-1, SHOTS)
        ids = (torch.tensor(column) for column in (answers, chosen, rejected))
        return _joined(images, before, questions, *ids)

    def texts(self, count: int, generator: torch.Generator) -> Batch:
        """Prompts that the questions decide: different ones in the demonstrations, symbols, images of any kinds."""
        images = self.image(torch.randint(KINDS, (count, SHOTS + 1), generator=generator), generator)
        questions = torch.rand(count, len(QUESTIONS), generator=generator).argsort(1)[:, :SHOTS]
        answers = KINDS + torch.rand(count, SEEN, generator=generator).argsort(1)[:, :SHOTS]
        place = torch.randint(SHOTS, (count, 1), generator=generator)
        right = answers.gather(1, place)[:, 0]
        return _joined(images, questions, questions.gather(1, place)[:, 0], answers, right, right)

    def images(self, count: int, generator: torch.Generator) -> Batch:
        """Prompts in words with one question throughout, and demonstrations of any kinds."""
        kinds = torch.randint(KINDS, (count, SHOTS + 1), generator=generator)
        question = torch.randint(len(QUESTIONS), (count,), generator=generator)
        before = question[:, None].expand(-1, SHOTS)
        # words have the ids of their kinds
        return _joined(self.image(kinds, generator), before, question, kinds[:, :-1], kinds[:, -1], kinds[:, -1])


def _joined(
    images: Tensor, questions: Tensor, question: Tensor, answers: Tensor, chosen: Tensor, rejected: Tensor
) -> Batch:
    return Batch(images[:, :-1], questions, answers, images[:, -1], question, chosen, rejected)


class Reader(nn.Module):
    """Answers from the query's image, and from the answers that attention finds beside images."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        # fixed: what a symbol that was never seen looks like is not learnt either
        self.tokens = torch.randn(len(IDS), WIDTH, generator=generator) / WIDTH**0.5
        self.asked = torch.randn(len(QUESTIONS), PIXELS, generator=generator)
        self.scale = nn.Parameter(torch.tensor(5.0))

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / rows**0.5)

        self.image, self.query, self.key = matrix(PIXELS, WIDTH), matrix(2 * PIXELS, WIDTH), matrix(2 * PIXELS, WIDTH)
        self.value, self.hidden, self.out = matrix(WIDTH, WIDTH), matrix(WIDTH, 4 * WIDTH), matrix(4 * WIDTH, WIDTH)

    def forward(self, batch: Batch) -> Tensor:
        """Log-probabilities of all tokens as the answer, [batch, tokens]."""
        key = torch.cat([batch.images, self.asked[batch.questions]], -1) @ self.key
        query = torch.cat([batch.query, self.asked[batch.question]], -1) @ self.query
        match = (key @ query[:, :, None])[..., 0] / WIDTH**0.5
        found = (match.softmax(1)[..., None] * (self.tokens[batch.answers] @ self.value)).sum(1)
        state = batch.query @ self.image + found
        state = state + (state @ self.hidden).relu() @ self.out
        return (self.scale * state @ self.tokens.T).log_softmax(1)


def run(settings: Settings) -> Outcome:
    """Trains the base models and what becomes of them, and tests all."""
    seeds, steps = (20, 1000) if settings.full else (4, 150)
    tests: list[dict[str, dict[str, float]]] = []
    for seed in settings.track(range(seeds), "seeds"):
        tests.append(_models(steps, settings.generator(seed)))

    def each(model: str, test: str) -> list[float]:
        return [found[model][test] for found in tests]

    def difference(model: str, other: str, test: str) -> list[float]:
        return [a - b for a, b in zip(each(model, test), each(other, test), strict=True)]

    overlook = f"{PAPER}, section 1"
    claims = [
        measure(
            "The base model's answers in words do not need the images of the demonstrations "
            "(accuracy lost where these are blank)",
            overlook,
            [a - b for a, b in zip(each(BASE, "words"), each(BASE, "words, blank"), strict=True)],
            at_most=0.02,
        ),
        measure(
            "It chooses among the symbols that it is shown no better than by chance of 0.25 (accuracy)",
            overlook,
            each(BASE, "shown symbols"),
            at_most=0.3,
        ),
        measure(
            "After SymDPO it finds the right one of them, though it has never seen these symbols (accuracy)",
            f"{PAPER}, experiments",
            each(SYMDPO, "shown symbols"),
            at_least=0.25,
        ),
        measure(
            "... and of all 262 tokens that symbol is the answer more often than a quarter of the time (accuracy)",
            f"{PAPER}, experiments",
            each(SYMDPO, "symbols"),
            at_least=0.25,
        ),
        measure(
            "Among the shown symbols it is found more often than after DPO on words (difference)",
            f"{PAPER}, experiments",
            difference(SYMDPO, GENERAL, "shown symbols"),
            at_least=0.0,
        ),
        measure(
            "... because of the images: where these are blank, nothing is found (accuracy among the shown)",
            f"{PAPER}, experiments",
            each(SYMDPO, "shown symbols, blank"),
            at_most=0.3,
        ),
        measure(
            "Rejecting other symbols as well does better than rejecting the word only (difference, among the shown)",
            "the authors mix both",
            difference(SYMDPO, AGAINST_WORD, "shown symbols"),
            at_least=0.0,
        ),
        measure(
            "SymDPO makes answers to demonstrations in words better, too (accuracy, difference to the base)",
            f"{PAPER}, experiments",
            difference(SYMDPO, BASE, "words"),
            at_least=0.0,
        ),
        measure(
            "It is the pairs against the word that cost these: without them more are right (accuracy, difference)",
            "ours",
            difference(AGAINST_SYMBOL, SYMDPO, "words"),
            at_least=0.0,
        ),
    ]
    series = {
        f"{test}, {model}": each(model, test) for model in MODELS for test in ("shown symbols", "symbols", "words")
    }
    return Outcome(claims, series)


def _models(steps: int, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """A base model and the three that DPO makes of it, tested."""
    world = World(generator)
    base = _base(world, generator)
    seen, unseen = SYMBOLS[:SEEN], SYMBOLS[SEEN:]

    def words(demonstrations: list[Demonstration], query: Demonstration) -> SymbolPair:
        others = [demo.answer for demo in demonstrations if demo.answer != query.answer]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        return SymbolPair(tuple(demonstrations), query.image, query.question, query.answer, other)

    def against_word(demonstrations: list[Demonstration], query: Demonstration) -> SymbolPair:
        return symbol_against_word(demonstrations, query, seen, generator=generator)

    def against_symbol(demonstrations: list[Demonstration], query: Demonstration) -> SymbolPair:
        return symbol_against_symbol(demonstrations, query, seen, generator=generator)

    def tested(demonstrations: list[Demonstration], query: Demonstration) -> SymbolPair:
        return symbol_against_word(demonstrations, query, unseen, generator=generator)

    makes = {GENERAL: words, AGAINST_WORD: against_word, AGAINST_SYMBOL: against_symbol}
    data = {name: world.pairs(make, PAIRS, generator) for name, make in makes.items()}
    halves = ([part[: PAIRS // 2] for part in data[name]] for name in (AGAINST_WORD, AGAINST_SYMBOL))
    data[SYMDPO] = Batch(*(torch.cat(parts) for parts in zip(*halves, strict=True)))
    models = {BASE: base} | {name: _after_dpo(base, batch, steps, generator) for name, batch in data.items()}
    in_words, in_symbols = world.pairs(words, PROMPTS, generator), world.pairs(tested, PROMPTS, generator)
    return {name: _tests(model, in_words, in_symbols) for name, model in models.items()}


def _base(world: World, generator: torch.Generator) -> Reader:
    model = Reader(generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(BASE_STEPS):
        parts = zip(world.images(BATCH // 2, generator), world.texts(BATCH // 2, generator), strict=True)
        batch = Batch(*map(torch.cat, parts))
        optimiser.zero_grad()
        nn.functional.nll_loss(model(batch), batch.chosen).backward()
        optimiser.step()
    return model


def _after_dpo(base: Reader, pairs: Batch, steps: int, generator: torch.Generator) -> Reader:
    """DPO from the base."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        references = _pair_logps(base, pairs)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        rows = torch.randint(PAIRS, (BATCH,), generator=generator)
        batch = Batch(*(part[rows] for part in pairs))
        optimiser.zero_grad()
        dpo_loss(*_pair_logps(model, batch), *(part[rows] for part in references), beta=0.1).losses.mean().backward()
        optimiser.step()
    return model


def _pair_logps(model: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
    logp = model(batch)
    chosen, rejected = (logp.gather(1, side[:, None])[:, 0] for side in (batch.chosen, batch.rejected))
    return chosen, rejected


def _tests(model: Reader, in_words: Batch, in_symbols: Batch) -> dict[str, float]:
    """Accuracies: among all tokens, and among those that are shown."""
    found = {}
    with torch.no_grad():
        for name, batch in (("words", in_words), ("symbols", in_symbols)):
            for suffix, images in (("", batch.images), (", blank", torch.zeros_like(batch.images))):
                logp = model(batch._replace(images=images))
                shown = batch.answers.gather(1, logp.gather(1, batch.answers).argmax(1, keepdim=True))[:, 0]
                found[name + suffix] = float((logp.argmax(1) == batch.chosen).float().mean())
                found[f"shown {name}{suffix}"] = float((shown == batch.chosen).float().mean())
    return found


def draw(outcome: Outcome) -> Figure:
    """Accuracies of the four models, on symbols and on words."""
    figure, axes = panels(3, width=4.0)
    titles = {"shown symbols": "Unseen symbols, among the shown", "symbols": "Unseen symbols", "words": "Words"}
    for axis, (test, title) in zip(axes, titles.items(), strict=True):
        for place, model in enumerate(MODELS):
            values = outcome.series[f"{test}, {model}"]
            axis.bar(place, statistics.fmean(values), color=f"C{place}", alpha=0.4)
            axis.plot([place] * len(values), values, "o", color=f"C{place}", markersize=4)
        axis.set_xticks(range(len(MODELS)), ["base", "DPO on\nwords", "against\nword", "against\nsymbols", "SymDPO"])
        axis.set(title=title, ylim=(0, 1.02))
    axes[0].axhline(1 / SHOTS, color="0.4", linestyle=":")
    axes[0].set_ylabel("accuracy, each seed")
    return figure
