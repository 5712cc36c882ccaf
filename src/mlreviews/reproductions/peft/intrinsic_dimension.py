"""How many random directions does fine-tuning need?

A byte-level model of Python source learns prose along d random directions, for growing d, and in full. The score is how
many bits per byte of unseen prose it saves. Quick: 5 values of d, 40 seconds. Full: a larger model, 7 values of d, an
hour and a half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mlreviews.models import TinyLM
from mlreviews.peft.intrinsic_dimension import IntrinsicWrapper, intrinsic_dimension
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.finetuning import FineTuning, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2012.13255"
RATE = 5e-4  # of full fine-tuning, the best of four
DIMS = {False: (16, 64, 256, 1024, 4096), True: (16, 64, 256, 1024, 4096, 16384, 65536)}
AWARE = 256  # where SAID is compared with DID


def run(settings: Settings) -> Outcome:
    """Measures what full fine-tuning and fine-tuning along d directions save, with and without pre-training."""
    task = fine_tuning(settings)
    dims = DIMS[settings.full]
    start = task.prose(task.model())
    model = task.model()
    total = sum(p.numel() for p in model.parameters())
    task.train(model, RATE, settings.generator(0))
    full = start - task.prose(model)
    saved: dict[int, float] = {}
    for dim in settings.track(dims, "dimensions"):
        saved[dim] = start - _trained(task, task.model(), dim, settings)
    # A model that knows nothing yet, on the same scale: what it saves against a uniform guess over 8 bits.
    blank = TinyLM(task.model().config, generator=settings.generator(7)).to(task.device)
    nothing = task.prose(blank)
    untrained = nothing - _trained(task, blank, AWARE, settings)
    scratch = TinyLM(task.model().config, generator=settings.generator(7)).to(task.device)
    task.train(scratch, RATE, settings.generator(0))
    scratch_full = nothing - task.prose(scratch)
    aware, plain = (
        [start - _trained(task, task.model(), AWARE, settings, structure_aware=said, draw=i) for i in range(3)]
        for said in (True, False)
    )
    found = intrinsic_dimension(saved.__getitem__, dims, full)
    half = intrinsic_dimension(saved.__getitem__, dims, full, 0.5)
    claims = [
        measure(
            "Few directions are enough: d_90 / D is 1 % at most (2 where no d tried reaches 90 %)",
            f"{PAPER}, section 4",
            2.0 if found is None else found / total,
            at_most=0.01,
        ),
        measure(
            "... and d_50 / D, for half of the gain",
            "ours",
            2.0 if half is None else half / total,
            at_most=0.01,
        ),
        measure(
            "The score rises with d (smallest rise from one d to the next)",
            f"{PAPER}, figure 1",
            min(b - a for a, b in zip(list(saved.values())[:-1], list(saved.values())[1:], strict=True)),
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "SAID does better than DID with as many trained numbers (256; SAID minus DID)",
            f"{PAPER}, table 1",
            [a - b for a, b in zip(aware, plain, strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "Pre-training lowers the intrinsic dimension: of what full training saves, 256 directions save more of it "
            "than from random weights (difference of the two parts)",
            f"{PAPER}, section 5.1",
            saved[AWARE] / full - untrained / scratch_full,
            at_least=0.0,
        ),
    ]
    series = {
        "d": [float(d) for d in dims],
        "saved": list(saved.values()),
        "saved, full": [full],
        "saved, SAID": aware,
        "parameters": [float(total)],
        "part saved from random weights": [untrained / scratch_full],
    }
    return Outcome(claims, series)


def _trained(
    task: FineTuning, model: TinyLM, dim: int, settings: Settings, *, structure_aware: bool = False, draw: int = 0
) -> float:
    """Bits per byte after fine-tuning along d directions."""
    generator = settings.generator(100 + dim + 100_000 * draw)
    wrapper = IntrinsicWrapper(model, dim, structure_aware=structure_aware, generator=generator).to(task.device)
    # A step of Adam moves each weight by about its rate times sqrt(d / n): by as much as in full fine-tuning.
    size = wrapper.projection(torch.ones(len(wrapper.theta), device=task.device)).square().mean().sqrt()
    task.train(wrapper, RATE / float(size), settings.generator(0))
    return task.prose(wrapper)


def draw(outcome: Outcome) -> Figure:
    """What is saved against d, with full fine-tuning and 90 % of it."""
    figure, (axis,) = panels(1, width=6, height=3.8)
    series = outcome.series
    axis.semilogx(series["d"], series["saved"], marker="o", label="DID, d directions")
    axis.semilogx([AWARE] * 3, series["saved, SAID"], marker="s", linestyle="", label="SAID")
    axis.axhline(series["saved, full"][0], color="0.3", label=f"full, {series['parameters'][0]:,.0f} parameters")
    axis.axhline(0.9 * series["saved, full"][0], color="0.3", linestyle=":", label="90 % of that")
    axis.set(title="Fine-tuning along random directions", xlabel="d", ylabel="saved, bits per byte of prose")
    axis.legend()
    return figure
