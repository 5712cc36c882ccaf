"""How many tokens a pass do mask tokens give a frozen model, and what do the gate, the head and the mode do for it?

Gated corrections, mask tokens and the head that guesses are trained on a shipped model of Python source, which stays
frozen. It then goes on greedily with held-out text, checking its guesses itself. Guesses are also looked at one by one
on held-out text: how often the head is right that sees the token before, and how often the model's own. What ordinary
corrections, without a gate, would cost is measured by merging the trained ones into the model.
The size of steps was chosen on other text; 60 steps, and fewer windows of text to look at guesses, left three claims
open. Claims are about groups of prompts, or windows of text, and one training.
Quick: the small model, 4 masks, 80 steps of 8 windows of 40 bytes, 5 groups of 2 prompts with 40 tokens. Full: the
large one, 8 masks, 2,000 steps of 16 windows of 96 bytes, 10 groups of 10 prompts with 128 tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mlreviews.datasets import TextSplit, python_source
from mlreviews.decoding.gated_lora_mtp import (
    GatedLoRALinear,
    MaskTokenLM,
    MTPSampler,
    mtp_generate,
    mtp_loss,
    mtp_training_batch,
)
from mlreviews.models import TinyLM, generate, load_pretrained
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2507.11851"
PROMPT = 128
WINDOWS, WINDOW = 32, 64  # of held-out text
QUADRATIC: Literal["quadratic"] = "quadratic"
LINEAR: Literal["linear"] = "linear"


def run(settings: Settings) -> Outcome:
    """Trains what guesses, decodes, and measures the parts."""
    masks = 8 if settings.full else 4
    model = load_pretrained("python-target" if settings.full else "python-draft").to(settings.device)
    lm, head, curve = _trained(model, masks, settings)
    decoded = _decoded(model, lm, head, settings)
    window = _windows(python_source().validation).to(settings.device)
    with torch.no_grad():
        right = _right(lm, head, window)
        plain, inside = model(window).logits, lm(window).logits
        bits = [_bits(logits, window) for logits in (plain, _merged(model, lm)(window).logits)]
    last = f"tokens a pass, quadratic, {masks} masks"
    before = f"tokens a pass, quadratic, {masks // 2} masks"
    claims = [
        measure(
            "Greedy text is that of plain decoding, to the token (share of texts)",
            f"{PAPER}, on verification",
            sum(decoded["texts that agree"]) / len(decoded["texts that agree"]),
            at_least=1,
        ),
        measure(
            "Behind the gate the model's logits are what they were (largest difference)",
            f"{PAPER}, on gated LoRA",
            float((plain - inside).abs().max()),
            at_most=0,
        ),
        measure(
            "The same corrections without a gate cost plain text (rise of the cross-entropy)",
            f"{PAPER}, gated against standard LoRA",
            (bits[1] - bits[0]).tolist(),
            at_least=0.05,
            unit="bits per byte",
        ),
        measure(
            f"With {masks} masks a pass gives several tokens (tokens a pass)",
            f"{PAPER}: 2.5 in chat to 5 in code, with 8 masks and an 8B model",
            decoded[last],
            at_least=1.5,
        ),
        measure(
            "Masks after each guess, the quadratic mode, give more than after the last one (tokens a pass, difference)",
            f"{PAPER}, on quadratic decoding",
            [a - b for a, b in zip(decoded[last], decoded["tokens a pass, linear"], strict=True)],
            at_least=0,
        ),
        measure(
            "Twice as many masks give more (tokens a pass, difference to half of them)",
            f"{PAPER}, experiments",
            [a - b for a, b in zip(decoded[last], decoded[before], strict=True)],
            at_least=0,
        ),
        measure(
            "The head that sees the token before is right more often than the model's own (difference of shares)",
            f"{PAPER}, on the sampler",
            (right["sampler"] - right["model"]).mean(1).tolist(),
            at_least=0,
        ),
    ]
    series = {**decoded, "loss": curve}
    series |= {f"right, {name}": share.mean(0).tolist() for name, share in right.items()}
    series |= {"bits per byte, frozen": [float(bits[0].mean())], "bits per byte, no gate": [float(bits[1].mean())]}
    return Outcome(claims, series)


def _trained(model: TinyLM, masks: int, settings: Settings) -> tuple[MaskTokenLM, MTPSampler, list[float]]:
    """What guesses, and the mean loss of every ten steps."""
    steps, batch, length = (2000, 16, 96) if settings.full else (80, 8, 40)
    generator = settings.generator()
    lm = MaskTokenLM(model, masks, generator=generator).to(settings.device)
    head = MTPSampler(model.config.d_model, model.vocab_size, generator=generator).to(settings.device)
    windows = python_source().train.batches(length - 1, batch, generator)
    groups = [{"params": [p for part in (lm, head) for p in part.parameters() if p.requires_grad], "lr": 3e-3}]

    def loss() -> Tensor:
        return mtp_loss(lm, head, next(windows).to(settings.device)).total

    both = nn.ModuleList([lm, head])
    losses = [value for _, value in settings.track(training(both, loss, steps, 0.0, groups=groups), "training", steps)]
    return lm.eval(), head.eval(), [sum(losses[i : i + 10]) / 10 for i in range(0, steps, 10)]


def _decoded(model: TinyLM, lm: MaskTokenLM, head: MTPSampler, settings: Settings) -> dict[str, list[float]]:
    """Tokens a pass for each group of prompts, and which texts are those of plain decoding."""
    groups, prompts, new = (10, 10, 128) if settings.full else (5, 2, 40)
    most = lm.k
    counts = [2**i for i in range(most.bit_length())]
    found: dict[str, list[float]] = {"masks": [float(k) for k in counts], "texts that agree": []}
    for group in settings.track(range(groups), "groups of prompts"):
        windows = python_source().validation.batches(
            PROMPT - 1, prompts, settings.generator(100 + group), within_documents=True
        )
        ids = next(windows).to(settings.device)
        texts = generate(model, ids, new).tokens
        for k in (*counts, 0):
            lm.k, mode = (k, QUADRATIC) if k else (most, LINEAR)
            results = [mtp_generate(lm, head, row, new, mode=mode) for row in ids.split(1)]
            agree = [torch.equal(r.tokens, text) for r, text in zip(results, texts.split(1), strict=True)]
            found["texts that agree"] += [float(x) for x in agree]
            name = f"tokens a pass, quadratic, {k} masks" if k else "tokens a pass, linear"
            found.setdefault(name, []).append(prompts * new / sum(r.target_calls for r in results))
        lm.k = most
    return found


def _windows(split: TextSplit) -> Tensor:
    """[windows, bytes], spread over the text."""
    starts = torch.linspace(0, len(split.data) - WINDOW, WINDOWS).long()
    ids = split.data[starts[:, None] + torch.arange(WINDOW)].long()
    return ids.masked_fill(ids == 0, ord("\n"))


def _right(lm: MaskTokenLM, head: MTPSampler, ids: Tensor) -> dict[str, Tensor]:
    """How often the true token is the likeliest one, [windows, masks], by the sampler and by the model's own head."""
    packed = mtp_training_batch(ids, lm.k, lm.vocab_size)
    out = lm(packed.ids, positions=packed.positions, tree=packed.tree, hidden_states=True)
    assert out.hidden_states is not None
    text = ids.shape[1] - lm.k - 1  # tokens all of whose masks have a target
    blocks = (len(ids), ids.shape[1], lm.k + 1)
    places, targets = (x.expand(len(ids), -1).reshape(blocks)[:, :text, 1:] for x in (packed.positions, packed.targets))
    states = out.hidden_states[-1].unflatten(1, blocks[1:])[:, :text, 1:]
    own = out.logits.unflatten(1, blocks[1:])[:, :text, 1:]
    previous = ids.gather(1, places.flatten(1)).view(places.shape)
    guesses = {"sampler": head(states, lm.embed_tokens(previous.flatten(1)).view(states.shape)), "model": own}
    return {name: (logits.argmax(-1) == targets).float().mean(1).cpu() for name, logits in guesses.items()}


def _merged(model: TinyLM, lm: MaskTokenLM) -> TinyLM:
    """The model with the corrections in its weights: no gate."""
    merged = TinyLM(model.config).to(model.lm_head.weight.device)
    merged.load_state_dict(model.state_dict())
    layers = dict(merged.named_modules())
    for name, module in lm.model.named_modules():
        if isinstance(module, GatedLoRALinear):
            layer = layers[name]
            assert isinstance(layer, nn.Linear)
            layer.weight += module.scale * module.lora_B @ module.lora_A
    return merged


def _bits(logits: Tensor, ids: Tensor) -> Tensor:
    """Bits per byte of each window."""
    nats = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return nats.mean(1).cpu() / math.log(2)


def draw(outcome: Outcome) -> Figure:
    """Tokens a pass by the number of masks, and how often guesses are right."""
    figure, (passes, right) = panels(2)
    series = outcome.series
    masks = series["masks"]
    rows = torch.tensor([series[f"tokens a pass, quadratic, {k:.0f} masks"] for k in masks])
    passes.plot(masks, rows.mean(1), marker="o", label="quadratic")
    passes.fill_between(masks, rows.amin(1), rows.amax(1), alpha=0.2, color="C0", linewidth=0)
    linear = series["tokens a pass, linear"]
    passes.plot(masks[-1:], [sum(linear) / len(linear)], marker="s", linestyle="", color="C1", label="linear")
    passes.set(title="Greedy text of a frozen model", xlabel="mask tokens", ylabel="tokens a pass (groups: band)")
    passes.set_xticks(masks)
    passes.set_ylim(1)
    passes.legend(loc="upper left")
    depth = range(1, len(series["right, sampler"]) + 1)
    right.plot(depth, series["right, sampler"], marker="o", label="head that sees the token before")
    right.plot(depth, series["right, model"], marker="o", label="the model's own head")
    right.set(title="Guesses on held-out text", xlabel="mask", ylabel="share that is right", ylim=(0, 1))
    right.set_xticks(list(depth))
    right.legend()
    return figure
