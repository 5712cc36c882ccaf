"""Tokens per second of the decoders on the shipped models, against plain decoding and transformers' own.

Every decoder continues the same prompts, held-out lines of Python's standard library, one after the other and in turn,
so that a machine that slows down slows all of them; some do it in batches as well. Given are medians over the prompts.
transformers runs the same weights, loaded into its Llama. The weights of all models are laid out by columns
(`mlreviews.models.column_major`).

Beside the measured speed-up stands the predicted one, where a draft model makes fixed drafts: (1 - a^(k+1)) / ((1 - a)
(c k + 1)) with a the mean of sum min(p, q) over the generated text and c the measured cost of a pass of the draft in
passes of the target.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from harness import Measurement, parser, report, use_threads
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mlreviews.datasets import python_source
from mlreviews.decoding import (
    Cascade,
    EagleDraft,
    MedusaHeads,
    PromptLookup,
    SVIPPolicy,
    acceptance_probability,
    eagle2_generate,
    eagle_generate,
    expected_speedup,
    jacobi_decode,
    lookahead_decode,
    medusa_generate,
    speculative_generate,
)
from mlreviews.decoding.trees import RankTree
from mlreviews.models import GenerationResult, Sampler, TinyLM, column_major, generate, load_pretrained

PROMPT, NEW = 128, 128  # tokens; a token is a byte
LENGTH = 4  # of fixed drafts
SPECULATIVE, PLAIN = f"speculative, {LENGTH} tokens", "plain"
LOOKUP, CASCADE = "prompt lookup", "lookup, else speculative"
BATCH = 8
IN_BATCHES = ("transformers generate", SPECULATIVE, "SVIP", LOOKUP, CASCADE, PLAIN)

Decoder = Callable[[Tensor, int, Sampler, int], GenerationResult]  # prompt, new tokens, sampler, seed


@dataclass(frozen=True)
class Models:
    """The shipped pair, and the same weights as models of transformers."""

    target: TinyLM
    draft: TinyLM
    llama: Any
    llama_draft: Any


@cache
def models() -> Models:
    target, draft = load_pretrained("python-target"), load_pretrained("python-draft-distilled")
    return Models(*(column_major(m) for m in (target, draft, as_llama(target), as_llama(draft))))


def as_llama(model: TinyLM) -> Any:
    """A transformers Llama with the weights of a `TinyLM`, which has its parameters' names."""
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=len(model.state_dict()["layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads or c.heads,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.context or 1024,
        tie_word_embeddings=c.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(config).eval()
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()}
    llama.load_state_dict({names[name]: x for name, x in model.state_dict().items()})
    return llama


def plain(ids: Tensor, new: int, sampler: Sampler, seed: int) -> GenerationResult:
    return generate(models().target, ids, new, sampler=sampler, generator=_rng(seed))


def speculative(ids: Tensor, new: int, sampler: Sampler, seed: int, **options: Any) -> GenerationResult:
    drafter = options.pop("drafter", models().draft)
    return speculative_generate(models().target, drafter, ids, new, sampler=sampler, generator=_rng(seed), **options)


def lookup_first() -> Cascade:
    """Copies where 5 bytes agree, else a draft of the model; 5 was chosen on text of the training part."""
    return Cascade(PromptLookup(shortest=5), models().draft, LENGTH)


def lookahead(ids: Tensor, new: int, sampler: Sampler, seed: int, **options: Any) -> GenerationResult:
    return lookahead_decode(models().target, ids, new, sampler=sampler, generator=_rng(seed), **options)


def jacobi(ids: Tensor, new: int, sampler: Sampler, seed: int) -> GenerationResult:
    return jacobi_decode(models().target, ids, new, sampler=sampler, generator=_rng(seed))


def peer(ids: Tensor, new: int, sampler: Sampler, seed: int, *, assisted: bool = False, **options: Any) -> Any:
    """transformers' generate; what it drafts is not told."""
    torch.manual_seed(seed)
    if assisted:
        assistant = models().llama_draft
        assistant.generation_config.num_assistant_tokens = LENGTH
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = assistant
    if not sampler.greedy:
        options |= {"do_sample": True, "temperature": sampler.temperature, "top_k": 0, "top_p": 1.0}
    else:
        options |= {"do_sample": False}
    whole = models().llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, **options
    )
    return GenerationResult(whole[:, ids.shape[1] :], torch.tensor([whole.shape[1] - ids.shape[1]]), 0)


def decoders() -> dict[str, Decoder]:
    """Name -> decoder; plain decoding last, with which all are compared."""
    policy = SVIPPolicy()
    found: dict[str, Decoder] = {
        "transformers generate": peer,
        "transformers assisted": partial(peer, assisted=True),
        "transformers prompt lookup": partial(peer, prompt_lookup_num_tokens=10),
        SPECULATIVE: partial(speculative, draft_length=LENGTH),
        "SVIP": partial(speculative, draft_length=policy.max_len, stop_drafting=policy.should_stop),
        LOOKUP: partial(speculative, drafter=PromptLookup(), draft_length=10),
        CASCADE: partial(speculative, drafter=lookup_first(), draft_length=10),
        "Jacobi": jacobi,
        "lookahead": partial(lookahead, window=3, ngram=5, guesses=4),
        **trained(),
        PLAIN: plain,
    }
    return found


def trained() -> dict[str, Decoder]:
    """The decoders whose trained drafters ship; each takes the tree that ships with its drafter, or grows its own."""
    eagle, heads = EagleDraft.load("python-eagle"), MedusaHeads.load("python-medusa")
    grown = {"top_k": 3, "depth": 6, "total_tokens": 16}
    return {
        "EAGLE": partial(_trained, eagle_generate, eagle, {}),
        "EAGLE, chain of 4": partial(_trained, eagle_generate, eagle, {"tree": RankTree.chain(4)}),
        "EAGLE-2": partial(_trained, eagle2_generate, eagle, grown),
        "Medusa": partial(_trained, medusa_generate, heads, {}),
    }


def _trained(
    function: Any, drafter: Any, options: dict[str, Any], ids: Tensor, new: int, sampler: Sampler, seed: int
) -> GenerationResult:
    return function(models().target, drafter, ids, new, sampler=sampler, generator=_rng(seed), **options)


def prompts(count: int, length: int) -> Tensor:
    """Held-out text at places that a seed chooses, [count, length]."""
    windows = python_source().validation.batches(length, count, _rng(7), within_documents=True)
    return next(windows)[:, :length]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def overlap(text: Tensor, sampler: Sampler, start: int) -> float:
    """Mean of sum min(p, q) over the places of a text [1, time] from `start` on: the acceptance rate to expect."""
    p, q = (sampler.probabilities(m(text).logits[0, start - 1 : -1]) for m in (models().target, models().draft))
    return float(acceptance_probability(p, q).mean())


def timed(
    ids: Tensor, new: int, sampler: Sampler, ways: dict[str, Decoder], batch: int
) -> tuple[list[Measurement], float, float, list[str]]:
    """Every decoder on every batch: the measurements, the mean overlap, c, and who differed from plain decoding."""
    found = {name: Measurement(name, [], None) for name in ways}
    counts: dict[str, list[GenerationResult]] = {name: [] for name in ways}
    overlaps: list[float] = []
    costs: list[float] = []
    differing: set[str] = set()
    for name in ways:  # what is loaded or compiled on first use
        ways[name](ids[:batch], 8, sampler, 0)
    for row in track(range(0, len(ids), batch), "timing", console=Console(stderr=True), transient=True):
        prompt = ids[row : row + batch]
        for name, decode in ways.items():
            start = time.perf_counter()
            result = decode(prompt, new, sampler, row)
            found[name].seconds.append(time.perf_counter() - start)
            counts[name].append(result)
        start = time.perf_counter()
        generate(models().draft, prompt, new, sampler=sampler, generator=_rng(row))
        costs.append((time.perf_counter() - start) / found[PLAIN].seconds[-1])
        text = counts[PLAIN][-1].tokens
        overlaps.append(overlap(torch.cat([prompt, text], 1), sampler, prompt.shape[1]))
        if sampler.greedy:
            differing |= {name for name in ways if not torch.equal(counts[name][-1].tokens, text)}
    acceptance, cost = statistics.fmean(overlaps), statistics.median(costs)
    for name, m in found.items():
        m.notes |= numbers(counts[name], m, batch * new)
        m.notes["speed_up"] = found[PLAIN].median / m.median
        expected = name == SPECULATIVE and batch == 1  # rows of a batch wait for each other
        m.notes["predicted"] = expected_speedup(acceptance, LENGTH, cost) if expected else math.nan
    return list(found.values()), acceptance, cost, sorted(differing)


def numbers(results: list[GenerationResult], m: Measurement, new: int) -> dict[str, float]:
    """Tokens a second and those of a row in a pass, and how many of the tokens that were tested were accepted."""
    calls = sum(r.target_calls for r in results)
    tested = accepted = 0
    for r in results:
        if r.accepted is not None and r.drafted is not None:
            accepted += int(r.accepted.clamp(min=0).sum())
            tested += int(torch.minimum(r.accepted + 1, r.drafted).clamp(min=0).sum())
    return {
        "tokens_per_second": new / m.median,
        "tokens_per_call": sum(float(r.lengths.double().mean()) for r in results) / calls if calls else math.nan,
        "acceptance": accepted / tested if tested else math.nan,
    }


def show(title: str, found: list[Measurement]) -> None:
    table = Table("decoder", title=title)
    for heading in ("tokens/s", "speed-up", "predicted", "tokens/pass", "acceptance"):
        table.add_column(heading, justify="right")
    for m in found:
        keys = ("tokens_per_second", "speed_up", "predicted", "tokens_per_call", "acceptance")
        digits = (0, 2, 2, 2, 2)
        cells = [f"{m.notes[k]:.{d}f}" if math.isfinite(m.notes[k]) else "" for k, d in zip(keys, digits, strict=True)]
        table.add_row(m.name, *cells)
    Console().print(table)


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    rounds, new = (1, 32) if arguments.quick else (arguments.rounds or 31, NEW)
    for batch in (1, BATCH):
        ways = {name: way for name, way in decoders().items() if batch == 1 or name in IN_BATCHES}
        for temperature in (0, 1):
            compare(arguments, ways, batch, rounds if batch == 1 else -(-rounds // 3), new, temperature)


def compare(
    arguments: argparse.Namespace, ways: dict[str, Decoder], batch: int, rounds: int, new: int, temperature: int
) -> None:
    """One table and its record: so many batches of prompts through each of the decoders."""
    ids = prompts(rounds * batch, PROMPT)
    found, acceptance, cost, differing = timed(ids, new, Sampler(float(temperature)), ways, batch)
    several = f"_batch_{batch}" if batch > 1 else ""
    name = f"decoding_temperature_{temperature}{several}_{torch.get_num_threads()}_threads"
    size = f"{rounds} x {batch} prompts of {PROMPT} bytes, {new} new"
    show(f"{name}: {size}; sum min(p, q) {acceptance:.3f}, c {cost:.3f}", found)
    if differing:
        Console().print("other tokens than plain decoding on a prompt or more: " + ", ".join(differing))
    settings = {
        "batches of prompts": rounds,
        "prompts in a batch": batch,
        "prompt tokens": PROMPT,
        "new tokens": new,
        "temperature": temperature,
        "sum min(p, q)": float(f"{acceptance:.4g}"),
        "cost of a pass of the draft": float(f"{cost:.4g}"),
        "decoders with other greedy tokens": ", ".join(differing) or "no",
    }
    report(name, found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
