"""Trains the byte-level language models that the package ships, on the source of Python's standard library.

::

    python -m mlreviews.reproductions.pretraining target --out weights/python-target
    python -m mlreviews.reproductions.pretraining draft --teacher weights/python-target --out weights/python-draft
    python -m mlreviews.reproductions.pretraining distilled --start weights/python-draft \\
        --teacher weights/python-target --out weights/distilled
    python -m mlreviews.reproductions.pretraining lengthened --start weights/distilled \\
        --teacher weights/python-target --out weights/python-draft-distilled
    python -m mlreviews.reproductions.pretraining large --device cuda --out weights/python-large

A run keeps a checkpoint in its folder and goes on from there when the same command is given again. At the end the
folder holds ``config.json``, ``model.safetensors`` (float16) and ``training.json``: the recipe, the seed, versions,
the loss curve, and bits per byte over the whole validation part, measured with the rounded weights.
`mlreviews.models.load_pretrained` reads such a folder, and the shipped ones by name.

Matrices of the blocks are trained by Muon (momentum, orthogonalised), everything else by AdamW. The rate rises over the
first steps, stays, and falls linearly to 0 over the last part, in which windows are longer. A draft learns what its
teacher expects as well: the cross-entropy with the teacher's distribution replaces that with the text in the last part.

The draft has a second stage, ``distilled``, after DistillSpec (arXiv:2310.08461): it goes on from the first one's
weights, follows the teacher from the first step on, and its loss has the total variation distance to the teacher as
well, which is the rate at which speculative decoding rejects what it drafts. Unlike in the paper, the text is the
corpus and not the teacher's own. Its windows are of 512 bytes, after which the draft knows positions beyond these no
more; a short third stage, ``lengthened``, with windows of 1,024, brings them back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mlreviews.datasets import TextSplit, python_source
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.training import bits_per_byte

__all__ = ["RECIPES", "Muon", "Recipe", "pretrain"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        config: sizes of the model.
        steps: updates.
        batch_bytes: bytes of text in an update.
        length: of a window, in bytes.
        last_length: of a window in the last part.
        last: the part of the steps over which the rate falls.
        warm_up: steps over which the rate rises.
        muon_rate: of the matrices.
        adam_rate: of the embedding and the gains.
        weight_decay: of the matrices, times the rate.
        distance: weight of the total variation distance to the teacher, beside the cross-entropy with it.
        seed: draws the weights and the windows.
    """

    config: TinyLMConfig = field(default_factory=TinyLMConfig)
    steps: int = 1000
    batch_bytes: int = 8192
    length: int = 512
    last_length: int = 1024
    last: float = 0.3
    warm_up: int = 50
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    weight_decay: float = 0.02
    distance: float = 0.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Of the highest rate, at a step counted from 0."""
        falling = self.last * self.steps
        return min(1.0, (step + 1) / self.warm_up, (self.steps - step) / falling)

    def in_last_part(self, step: int) -> bool:
        """Whether the rate falls at this step."""
        return step >= (1 - self.last) * self.steps


DRAFT = TinyLMConfig(d_model=112, layers=2, heads=4, kv_heads=1, hidden=304, context=1024)
RECIPES = {
    # 3.3 million parameters, and 11 times fewer: depth is what a step of decoding costs, so the draft has 2 blocks.
    "target": Recipe(TinyLMConfig(d_model=160, layers=12, heads=5, kv_heads=1, hidden=432, context=1024)),
    "draft": Recipe(DRAFT, steps=800),
    "distilled": Recipe(
        DRAFT,
        steps=2000,
        batch_bytes=4096,
        last_length=512,
        last=1.0,
        distance=1.0,
        seed=1,
    ),
    # The draft saw windows of 512 bytes in that stage and has to be led back to 1,024.
    "lengthened": Recipe(
        DRAFT,
        steps=280,
        batch_bytes=4096,
        last=1.0,
        warm_up=20,
        muon_rate=0.01,
        adam_rate=0.0015,
        distance=1.0,
        seed=2,
    ),
    # For a GPU: 87 million parameters, 2.6 billion bytes.
    "large": Recipe(
        TinyLMConfig(d_model=768, layers=12, heads=12, kv_heads=4, context=1024),
        steps=20_000,
        batch_bytes=131_072,
        warm_up=500,
    ),
}
CHECKPOINT_EVERY = 100


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, by five Newton-Schulz steps (Jordan et al. 2024, the quintic of Muon).

    Args:
        matrices: [..., rows, columns]; singular values come out between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised, for matrices; all matrices of one shape at once.

    `torch.optim.Muon` takes one matrix at a time, in bfloat16, which on a CPU takes 20 times as long.

    Args:
        matrices: parameters of two axes.
        lr: step size; the root mean square of a square matrix's update is ``lr / sqrt(columns)``.
        momentum: of Nesterov's form.
        weight_decay: decoupled, times the rate.
    """

    def __init__(
        self, matrices: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"matrices: expected two axes, got shape {tuple(matrix.shape)}")
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient stay."""
        if closure is not None:
            raise ValueError("closure: Muon doesn't evaluate the loss again")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                self._update(matrices, max(1.0, shape[0] / shape[1]) ** 0.5 * group["lr"], group)

    def _update(self, matrices: list[nn.Parameter], rate: float, group: dict[str, Any]) -> None:
        directions = []
        for matrix in matrices:
            assert matrix.grad is not None
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 1 - group["momentum"])
            directions.append(matrix.grad.lerp(momentum, group["momentum"]))
        for matrix, direction in zip(matrices, orthogonalised(torch.stack(directions)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)


def optimisers(model: TinyLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean cross-entropy of the teacher's distribution with the student's, in nats."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), teacher_logits.flatten(0, 1).softmax(1))


def distance(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean total variation distance of the student's distribution to the teacher's: 1 less mean sum min(p, q)."""
    return (logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1).mean() / 2


def pretrain(
    recipe: Recipe,
    out: Path,
    *,
    teacher: TinyLM | None = None,
    start: Path | None = None,
    device: str = "cpu",
    split: TextSplit | None = None,
) -> Iterator[tuple[int, float]]:
    """Trains, or goes on with the run in `out`, and writes model and record there at the end.

    Args:
        recipe: sizes and settings.
        out: folder; a checkpoint of another recipe in it is an error.
        teacher: a model with the same vocabulary, for the last part.
        start: folder of a run whose weights are gone on from; None draws them.
        device: where to train.
        split: text; None is the training part of `mlreviews.datasets.python_source`.

    Yields:
        After each step: its number, from 1 on, and its loss in bits per byte.

    Raises:
        ValueError: the checkpoint in `out` was made with another recipe.
    """
    split = python_source().train if split is None else split
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = (TinyLM(recipe.config, generator=generator) if start is None else TinyLM.load(start)).to(device)
    rules = optimisers(model, recipe)
    checkpoint, done, seconds, curve = out / "checkpoint.pt", 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["recipe"] != json.dumps(asdict(recipe)):
            raise ValueError(f"out: {checkpoint.name} in it belongs to another recipe")
        model.load_state_dict(saved["model"])
        for rule, state in zip(rules, saved["rules"], strict=True):
            rule.load_state_dict(state)
        done, seconds, curve = saved["step"], saved["seconds"], saved["curve"]
    began = time.perf_counter() - seconds
    for step in range(done, recipe.steps):
        loss = _update(model, rules, recipe, step, split, teacher)
        curve.append(round(loss, 4))
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.steps:
            state = {
                "recipe": json.dumps(asdict(recipe)),
                "model": model.state_dict(),
                "rules": [rule.state_dict() for rule in rules],
                "step": step + 1,
                "seconds": time.perf_counter() - began,
                "curve": curve,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        yield step + 1, loss
    _write(model, recipe, out, time.perf_counter() - began, curve, teacher, start)


def _update(
    model: TinyLM,
    rules: list[torch.optim.Optimizer],
    recipe: Recipe,
    step: int,
    split: TextSplit,
    teacher: TinyLM | None,
) -> float:
    last = recipe.in_last_part(step)
    length = recipe.last_length if last else recipe.length
    # The windows of a step depend on nothing but its number, so that a run that goes on sees the same text.
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step + 1)
    window = next(split.batches(length, max(1, recipe.batch_bytes // length), generator))
    window = window.to(model.embed_tokens.weight.device)
    logits = model(window[:, :-1]).logits
    text = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    loss = text
    if teacher is not None and last:
        with torch.no_grad():
            expected = teacher(window[:, :-1]).logits
        loss = soft_cross_entropy(logits, expected)
        if recipe.distance:
            loss = loss + recipe.distance * distance(logits, expected)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    for rule, rate in zip(rules, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in rule.param_groups:
            group["lr"] = rate * recipe.rate(step)
        rule.step()
        rule.zero_grad()
    return float(text.detach()) / math.log(2)


def _write(
    model: TinyLM,
    recipe: Recipe,
    out: Path,
    seconds: float,
    curve: list[float],
    teacher: TinyLM | None,
    start: Path | None,
) -> None:
    """The shipped form: rounded to float16, and measured after rounding."""
    model.half().save(out)
    model.float()
    corpus = python_source()
    validation = corpus.validation
    length = recipe.config.context or recipe.last_length
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_of_text": recipe.steps * recipe.batch_bytes,
        "corpus": corpus.description,
        "validation_bits_per_byte": round(bits_per_byte(model, validation, length, len(validation.data)), 4),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "loss_curve": {"unit": "bits per byte of each step's windows, mean of 10 steps", "values": _tens(curve)},
    }
    if teacher is not None:
        record["acceptance"] = acceptance(model, teacher, validation, length)
    if start is not None:
        record["first_stage"] = json.loads((start / "training.json").read_text(encoding="utf-8"))
        if teacher is not None:
            before = TinyLM.load(start).to(model.embed_tokens.weight.device)
            record["acceptance_before"] = acceptance(before, teacher, validation, length)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def acceptance(model: TinyLM, teacher: TinyLM, split: TextSplit, length: int, count: int = 64) -> dict[str, Any]:
    """How often a token that the model drafts is accepted by its teacher: mean sum min(p, q) at two temperatures.

    Args:
        model: the draft.
        teacher: the target.
        split: text; the places are those after random windows of it, the same in every call.
        length: of a window, in bytes.
        count: windows, in batches of 8.
    """
    device = model.embed_tokens.weight.device
    windows = split.batches(length, 8, torch.Generator().manual_seed(0))
    means = []
    for window in itertools.islice(windows, count // 8):
        p, q = (m(window[:, :-1].to(device)).logits for m in (teacher, model))
        means.append([float((p.argmax(-1) == q.argmax(-1)).double().mean()), 1 - float(distance(q, p))])
    greedy, drawn = torch.tensor(means).mean(0).tolist()
    return {"held_out_bytes": count * length, "temperature_0": round(greedy, 4), "temperature_1": round(drawn, 4)}


def _tens(curve: list[float]) -> list[float]:
    return [round(sum(part) / len(part), 3) for part in (curve[i : i + 10] for i in range(0, len(curve), 10))]


def main() -> None:
    """The command line: see the module's docstring."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recipe", choices=RECIPES)
    options.add_argument("--out", type=Path, required=True, help="folder of the run")
    options.add_argument("--teacher", type=Path, help="folder of a trained model, for a draft")
    options.add_argument("--start", type=Path, help="folder of the run to go on from, for the second stage of a draft")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, help="threads of torch; default: what torch chooses")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe, console = RECIPES[arguments.recipe], Console()
    teacher = None
    if arguments.teacher:
        teacher = TinyLM.load(arguments.teacher).to(arguments.device).requires_grad_(False)
    began = time.perf_counter()
    run = pretrain(recipe, arguments.out, teacher=teacher, start=arguments.start, device=arguments.device)
    for step, loss in run:
        if step % 20 == 0:
            console.print(f"step {step}/{recipe.steps}: {loss:.3f} bits per byte, {time.perf_counter() - began:.0f} s")
    console.print(f"written: {arguments.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
