"""Trains the drafters that ship with the package, EAGLE's layer and Medusa's heads, on a target and its text.

::

    python -m mlreviews.reproductions.drafters eagle medusa --teacher python-target --out weights

At the end the folders ``python-eagle`` and ``python-medusa`` in ``weights`` hold ``config.json``, ``model.safetensors``
(float16) and ``training.json``: the recipe, the loss curve, and how often the guesses of each rank are right at each
depth, measured with the rounded weights on text that the target writes greedily after prompts of the validation part.
The tree in ``config.json`` is the likeliest by these numbers (`RankTree.likeliest`). `EagleDraft.load` and
`MedusaHeads.load` read such a folder.

The target is frozen and runs once over each window; its hidden states serve all epochs and drafters. Matrices are
trained by Muon, the rest by AdamW, at rates that rise over the first steps and fall linearly to 0 from halfway on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mlreviews.datasets import TextSplit, python_source
from mlreviews.decoding import EagleDraft, MedusaHeads, eagle_loss, medusa_loss
from mlreviews.decoding.trees import RankTree, TrainedDrafter
from mlreviews.models import TinyLM, generate, load_pretrained
from mlreviews.reproductions.pretraining import Muon

__all__ = [
    "RECIPES",
    "DrafterRecipe",
    "eagle_accuracies",
    "medusa_accuracies",
    "new_drafter",
    "seen_text",
    "train_drafter",
]


@dataclass(frozen=True)
class DrafterRecipe:
    """How a drafter is trained.

    Attributes:
        windows: of text.
        length: of a window, in bytes.
        epochs: how often each window is used.
        batch: windows in an update.
        muon_rate: of the matrices.
        adam_rate: of biases and gains, and of Medusa's stacks of matrices.
        warm_up: steps over which the rates rise.
        noise: EAGLE: half the width of the uniform noise on the features.
        w_cls: EAGLE: weight of the cross-entropy.
        heads: Medusa: how many.
        nodes: of the tree that is shipped, the root not counted.
        height: of that tree at most.
        seed: draws weights, windows and noise.
    """

    windows: int = 1000
    length: int = 256
    epochs: int = 4
    batch: int = 8
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    warm_up: int = 20
    noise: float = 0.1
    w_cls: float = 0.1
    heads: int = 5
    nodes: int = 24
    height: int = 8
    seed: int = 0

    @property
    def steps(self) -> int:
        """Updates."""
        return self.epochs * self.windows // self.batch

    def rate(self, step: int) -> float:
        """Of the highest rate, at a step counted from 0."""
        return min(1.0, (step + 1) / self.warm_up, (self.steps - step) / (0.5 * self.steps))


RECIPES = {"eagle": DrafterRecipe(nodes=14, height=6), "medusa": DrafterRecipe(height=5)}


def new_drafter(kind: str, teacher: TinyLM, recipe: DrafterRecipe) -> EagleDraft | MedusaHeads:
    """A drafter with a layer as the target's have them, or with heads that start as the target's."""
    config, generator = teacher.config, torch.Generator().manual_seed(recipe.seed)
    if kind == "eagle":
        return EagleDraft(
            config.d_model, config.heads, kv_heads=config.kv_heads, hidden=config.hidden, generator=generator
        )
    return MedusaHeads(config.d_model, config.vocab_size, recipe.heads, lm_head=teacher.lm_head.weight.detach())


@torch.no_grad()
def seen_text(teacher: TinyLM, split: TextSplit, recipe: DrafterRecipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows, ids [batch, length + 1], and the target's last hidden states for them in float16."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    batches = split.batches(recipe.length, recipe.batch, generator)
    for _ in range(recipe.windows // recipe.batch):
        ids = next(batches)
        yield ids, _features(teacher, ids).half()


def train_drafter(
    drafter: EagleDraft | MedusaHeads, teacher: TinyLM, recipe: DrafterRecipe, text: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[int, float]]:
    """Trains in place.

    Args:
        drafter: as of `new_drafter`.
        teacher: the target; it stays as it is.
        recipe: settings.
        text: batches as of `seen_text`.

    Yields:
        After each step: its number, from 1 on, and the loss before it.
    """
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    everything = list(drafter.parameters())
    matrices = [p for p in everything if p.ndim == 2 and isinstance(drafter, EagleDraft)]
    rest = [p for p in everything if not any(p is matrix for matrix in matrices)]
    rules: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(rest, weight_decay=0.0), recipe.adam_rate),
        *([(Muon(matrices), recipe.muon_rate)] if matrices else []),
    ]
    for step in range(recipe.steps):
        if step % len(text) == 0:
            order = torch.randperm(len(text), generator=generator).tolist()
        ids, hidden = text[order[step % len(text)]]
        loss = drafter_loss(drafter, teacher, recipe, ids, hidden.float(), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0, foreach=True)
        for rule, rate in rules:
            for group in rule.param_groups:
                group["lr"] = rate * recipe.rate(step)
            rule.step()
            rule.zero_grad()
        yield step + 1, float(loss.detach())


def drafter_loss(
    drafter: EagleDraft | MedusaHeads,
    teacher: TinyLM,
    recipe: DrafterRecipe,
    ids: Tensor,
    hidden: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """EAGLE's loss with noise on the features, or Medusa's."""
    if isinstance(drafter, MedusaHeads):
        return medusa_loss(drafter(hidden), ids)
    noise = recipe.noise * (2 * torch.rand(hidden.shape, generator=generator) - 1)
    predicted, _ = drafter((hidden + noise)[:, :-1], teacher.embed_tokens(ids[:, 1:]))
    return eagle_loss(predicted, hidden[:, 1:], teacher.lm_head, recipe.w_cls)


def _features(model: TinyLM, ids: Tensor) -> Tensor:
    states = model(ids, hidden_states=True).hidden_states
    assert states is not None
    return states[-1]


@torch.no_grad()
def written_text(
    teacher: TinyLM, rows: int = 16, prompt: int = 192, new: int = 64, seed: int = 5
) -> tuple[Tensor, Tensor]:
    """Ids [rows, prompt + new] that the target has written greedily from `prompt` on, and its features for them."""
    generator = torch.Generator().manual_seed(seed)
    start = next(python_source().validation.batches(prompt - 1, rows, generator))
    ids = torch.cat([start, generate(teacher, start, new).tokens], 1)
    return ids, _features(teacher, ids)


@torch.no_grad()
def eagle_accuracies(
    drafter: EagleDraft, teacher: TinyLM, ids: Tensor, features: Tensor, *, start: int, depth: int, ranks: int = 4
) -> Tensor:
    """How often the guess of each rank is right at each depth of a branch that is right so far, [depth, ranks].

    Args:
        drafter: guesses.
        teacher: whose embedding and head it uses.
        ids: [rows, time], what the target writes.
        features: the target's for these.
        start: the first place of a token that counts.
        depth: how many features in a row are predicted from predicted ones.
        ranks: guesses that are looked at.
    """
    embeddings, time = teacher.embed_tokens(ids[:, 1:]), ids.shape[1] - 1
    same, before = torch.eye(time, dtype=torch.bool), torch.ones(time, time, dtype=torch.bool).tril()
    # Row j of level k goes on from the true features up to j with k predicted ones, which no other row sees.
    predicted, cache = drafter(features[:, :-1], embeddings)
    table = []
    for k in range(depth):
        n = time - k
        if k:
            own = [same[:n, : time - i] for i in range(1, k + 1)]
            predicted, cache = drafter(
                predicted[:, :n],
                embeddings[:, k:],
                cache,
                positions=torch.arange(n) + k,
                seen=torch.cat([before[:n], *own], 1),
            )
        guesses = teacher.lm_head(predicted[:, start : time - k - 1]).topk(ranks, -1).indices
        right = guesses == ids[:, start + k + 2 :, None]
        table.append(right.double().mean((0, 1)))
    return torch.stack(table)


@torch.no_grad()
def medusa_accuracies(heads: MedusaHeads, ids: Tensor, features: Tensor, *, start: int, ranks: int = 8) -> Tensor:
    """How often the guess of each rank of each head is right, [heads, ranks]; arguments as of `eagle_accuracies`."""
    guesses = heads(features[:, start:]).topk(ranks, -1).indices
    table = []
    for k in range(1, guesses.shape[2] + 1):
        right = guesses[:, : -k - 1, k - 1] == ids[:, start + k + 1 :, None]
        table.append(right.double().mean((0, 1)))
    return torch.stack(table)


def write(
    drafter: EagleDraft | MedusaHeads,
    teacher: TinyLM,
    recipe: DrafterRecipe,
    out: Path,
    seconds: float,
    curve: list[float],
) -> None:
    """The shipped form: rounded to float16, measured after rounding, with the tree that suits it."""
    drafter.half().float()
    ids, features = written_text(teacher)
    if isinstance(drafter, EagleDraft):
        table = eagle_accuracies(drafter, teacher, ids, features, start=192, depth=recipe.height)
    else:
        table = medusa_accuracies(drafter, ids, features, start=192)
    drafter.tree = RankTree.likeliest(table, recipe.nodes)
    _save(drafter, out)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in drafter.parameters()),
        "bytes_of_text": recipe.windows * recipe.length,
        "corpus": python_source().description,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "accuracies": [[round(x, 4) for x in row] for row in table.tolist()],
        "loss_curve": {
            "unit": "loss of each step, mean of 10 steps",
            "values": [
                round(sum(part) / len(part), 4) for part in (curve[i : i + 10] for i in range(0, len(curve), 10))
            ],
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _save(drafter: TrainedDrafter, out: Path) -> None:
    drafter.half().save(out)
    drafter.float()


def main() -> None:
    """The command line: see the module's docstring."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kinds", choices=RECIPES, nargs="+")
    options.add_argument("--teacher", default="python-target", help="a shipped model, or a folder")
    options.add_argument("--out", type=Path, required=True, help="where the drafters' folders are made")
    options.add_argument("--windows", type=int, help="windows of text, instead of the recipe's")
    options.add_argument("--epochs", type=int, help="how often each is used, likewise")
    arguments = options.parse_args()
    given = {name: n for name in ("windows", "epochs") if (n := getattr(arguments, name)) is not None}
    console, began = Console(), time.perf_counter()
    teacher = load_pretrained(arguments.teacher).requires_grad_(False)
    recipes = {kind: replace(RECIPES[kind], **given) for kind in arguments.kinds}
    recipe = recipes[arguments.kinds[0]]
    text = []
    for batch in seen_text(teacher, python_source().train, recipe):
        text.append(batch)
        if len(text) % 20 == 0:
            console.print(f"window {len(text) * recipe.batch}/{recipe.windows}, {time.perf_counter() - began:.0f} s")
    for kind in arguments.kinds:
        recipe, curve = recipes[kind], []
        drafter = new_drafter(kind, teacher, recipe)
        for step, loss in train_drafter(drafter, teacher, recipe, text):
            curve.append(loss)
            if step % 20 == 0:
                seconds = time.perf_counter() - began
                console.print(f"{kind}, step {step}/{recipe.steps}: loss {loss:.4f}, {seconds:.0f} s")
        write(drafter, teacher, recipe, arguments.out / f"python-{kind}", time.perf_counter() - began, curve)
        console.print(f"written: {arguments.out / f'python-{kind}'}", soft_wrap=True)


if __name__ == "__main__":
    main()
