"""DoLa: brute force for the choice of the layer, models cut short for the early exits, and the contrast's limits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mlreviews.decoding import DoLa, candidate_layers, contrast_logits, dola_logits, js_divergence
from mlreviews.models import CausalLM, Sampler, TinyLM, TinyLMConfig, from_transformers, generate

BATCH, TIME, VOCAB, LAYERS = 2, 5, 11, 6


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _logits(layers: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = scale * torch.randn(layers + 1, BATCH, TIME, VOCAB, generator=_rng(), dtype=torch.float64)
    return drawn[0], drawn[1:]


def _model(*, tied: bool = True) -> TinyLM:
    config = TinyLMConfig(vocab_size=VOCAB, d_model=12, layers=LAYERS, heads=2, hidden=16, tied=tied)
    model = TinyLM(config, generator=_rng()).double().eval()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(8)
        model.norm.weight.add_(0.3 * torch.randn(12, generator=_rng(1)))
    return model


def _cut(model: TinyLM, blocks: int) -> TinyLM:
    """The model with its first blocks alone, whose logits are an early exit."""
    short = copy.deepcopy(model)
    short.layers = nn.ModuleList(list(short.layers)[:blocks])
    return short


def test_the_divergence_is_scipy_s_and_lies_between_0_and_ln_2() -> None:
    p, q = (x.log_softmax(-1) for x in _logits(1))
    expected = jensenshannon(p.exp().numpy(), q[0].exp().numpy(), axis=-1) ** 2
    torch.testing.assert_close(js_divergence(p, q[0]), torch.from_numpy(expected))
    apart = torch.eye(2, dtype=torch.float64).log()
    assert float(js_divergence(apart[0], apart[1])) == pytest.approx(math.log(2), abs=1e-15)
    assert 0 <= float(js_divergence(p, p).max()) < 1e-15
    close = torch.randn(500, 300, generator=_rng()).log_softmax(-1)
    assert float(js_divergence(close, close.clone()).min()) >= 0


def test_the_farthest_layer_is_chosen_for_each_row_and_token() -> None:
    final, early = _logits()
    logits, chosen = dola_logits(final, early, 0.2)
    assert len(set(chosen.flatten().tolist())) > 2
    for b in range(BATCH):
        for t in range(TIME):
            p, candidates = final[b, t].softmax(-1).numpy(), early[:, b, t].softmax(-1).numpy()
            best = max(range(len(candidates)), key=lambda j: jensenshannon(p, candidates[j]))
            assert int(chosen[b, t]) == best
            stays = p >= 0.2 * p.max()
            assert 0 < stays.sum() < VOCAB
            ratio = p / candidates[best]
            expected = torch.from_numpy(ratio * stays / (ratio * stays).sum())
            torch.testing.assert_close(logits[b, t].softmax(-1), expected)
            assert (Sampler(temperature=1.0).probabilities(logits)[b, t][~torch.from_numpy(stays)] == 0).all()


def test_layers_that_agree_leave_what_is_likely_uniform() -> None:
    final, _ = _logits()
    logits = contrast_logits(final, final + 3.0, 0.1)  # the same distribution
    stays = final.softmax(-1) >= 0.1 * final.softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(logits[stays], torch.zeros(int(stays.sum()), dtype=torch.float64))
    assert (logits[~stays] == -math.inf).all()


def test_a_uniform_early_layer_leaves_the_last_one_renormalised() -> None:
    final, _ = _logits()
    p = final.softmax(-1)
    cut = p.where(p >= 0.1 * p.amax(-1, keepdim=True), 0.0)
    found = contrast_logits(final, torch.full_like(final, -7.0)).softmax(-1)
    torch.testing.assert_close(found, cut / cut.sum(-1, keepdim=True))
    # as alpha goes to 0, all tokens stay
    torch.testing.assert_close(contrast_logits(final, torch.zeros_like(final), 1e-300).softmax(-1), p)


def test_half_precision_is_contrasted_in_float32() -> None:
    final, early = (x.bfloat16() for x in _logits())
    assert dola_logits(final, early)[0].dtype == torch.float32


def test_reduces_to_greedy_decoding() -> None:
    model, ids = _model(), torch.randint(VOCAB, (BATCH, TIME), generator=_rng(3))
    expected = generate(model, ids, 12).tokens
    assert torch.equal(generate(DoLa(model, alpha=1.0), ids, 12).tokens, expected)
    assert not torch.equal(generate(DoLa(model, alpha=1e-3), ids, 12).tokens, expected)


@pytest.mark.parametrize("layers", ["high", (0, 1, 5)])
def test_early_exits_are_those_of_a_model_cut_short(layers: Any) -> None:
    model, ids = _model(tied=False), torch.randint(VOCAB, (BATCH, TIME), generator=_rng(3))
    wanted = [4] if layers == "high" else layers
    early = torch.stack([_cut(model, layer)(ids).logits for layer in wanted])
    expected, _ = dola_logits(model(ids).logits, early, 0.3)
    out = DoLa(model, layers, alpha=0.3)(ids)
    torch.testing.assert_close(out.logits, expected)
    assert out.hidden_states is None


def test_transformers_states_are_exited_likewise() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCAB, (BATCH, TIME), generator=_rng(3))
    short = copy.deepcopy(llama)
    short.model.layers = short.model.layers[:2]
    short.config.num_hidden_layers = 2
    with torch.no_grad():
        expected, _ = dola_logits(llama(ids).logits, short(ids).logits[None], 0.1)
    torch.testing.assert_close(DoLa(from_transformers(llama), [2])(ids).logits, expected)


def test_is_a_model_that_decoders_take_with_a_cache() -> None:
    model = _model()
    dola = DoLa(model, "low")
    assert isinstance(dola, CausalLM)
    assert (dola.vocab_size, dola.max_length) == (VOCAB, None)
    ids = torch.randint(VOCAB, (BATCH, 9), generator=_rng(3))
    out = dola(ids, hidden_states=True)
    assert out.hidden_states is not None
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), model(ids).logits)
    last = dola(ids[:, 4:], dola(ids[:, :4]).cache).logits
    torch.testing.assert_close(last, out.logits[:, 4:])
    tokens = generate(dola, ids, 4, sampler=Sampler(temperature=1.0), generator=_rng(4)).tokens
    assert tokens.shape == (BATCH, 4)


def test_a_row_with_padding_gets_its_own_logits() -> None:
    dola, ids = DoLa(_model(), "low"), torch.randint(VOCAB, (1, 6), generator=_rng(3))
    padded, mask = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], 1), torch.arange(8)[None] >= 2
    torch.testing.assert_close(dola(padded, mask=mask).logits[:, 2:], dola(ids).logits)


def test_buckets_are_the_paper_s() -> None:
    assert candidate_layers(32, "low") == list(range(0, 16, 2))
    assert candidate_layers(32, "high") == list(range(16, 32, 2))
    assert candidate_layers(40, "high") == list(range(20, 40, 2))
    assert candidate_layers(60, "high") == list(range(40, 60, 2))
    assert candidate_layers(80, "low") == list(range(0, 20, 2))
    assert candidate_layers(32, "low", tied=True) == list(range(2, 16, 2))
    assert candidate_layers(6, "high") == [4]
    assert candidate_layers(42, "low") == list(range(0, 14, 2))  # two buckets would have 21 layers
    assert DoLa(_model(tied=True), "low").early_logits((torch.zeros(1, 1, 12).double(),) * 7).shape[0] == 1
    assert DoLa(_model(tied=False), "low").early_logits((torch.zeros(1, 1, 12).double(),) * 7).shape[0] == 2


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    final, early = _logits()
    model, ids = _model(), torch.zeros(1, 2, dtype=torch.int64)
    for alpha in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            DoLa(model, alpha=alpha)
    with pytest.raises(ValueError, match="early"):
        dola_logits(final, early[:0])
    with pytest.raises(ValueError, match="early"):
        dola_logits(final, early[..., :3])
    for layers in ("middle", ()):
        with pytest.raises(ValueError, match="layers"):
            DoLa(model, layers)  # type: ignore[arg-type]
    for bad in (6, -1):
        with pytest.raises(ValueError, match="from 0 to 5"):
            DoLa(model, [1, bad])(ids)
    with pytest.raises(ValueError, match="bucket"):
        candidate_layers(8, "middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers"):
        candidate_layers(1, "low")
    with pytest.raises(ValueError, match="no candidate"):
        candidate_layers(2, "low", tied=True)
