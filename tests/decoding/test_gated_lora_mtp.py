"""Gated-LoRA MTP: closed gates to the bit, packed passes against separate ones, and the law of plain decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mlreviews.common.layers import linear
from mlreviews.decoding.gated_lora_mtp import (
    GatedLoRALinear,
    MaskTokenLM,
    MTPSampler,
    latent_consistency_loss,
    mtp_generate,
    mtp_loss,
    mtp_training_batch,
)
from mlreviews.models import CausalLM, Sampler, TinyLM, TinyLMConfig, from_transformers, generate
from tests.contracts.families import Sample
from tests.decoding.models import assert_same_law, exact_law, law_of_chain

VOCAB = 11


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(vocab: int = VOCAB, layers: int = 2) -> TinyLM:
    config = TinyLMConfig(vocab_size=vocab, d_model=12, layers=layers, heads=2, hidden=16, context=40)
    model = TinyLM(config, generator=_rng()).eval()
    with torch.no_grad():
        model.norm.weight.mul_(4)
    return model


def _lm(k: int = 3, vocab: int = VOCAB) -> tuple[MaskTokenLM, MTPSampler]:
    """With corrections that do something, and a head that guesses at random, in float64."""
    lm = MaskTokenLM(_model(vocab), k, rank=2, alpha=3.0, generator=_rng(1)).double()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=_rng(2))
    return lm, MTPSampler(12, vocab, generator=_rng(3)).double()


def _ids(batch: int = 3, time: int = 5) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=_rng(5))


def _layer() -> GatedLoRALinear:
    return GatedLoRALinear(linear(6, 4, generator=_rng()), 2, alpha=3.0, generator=_rng(1))


CONTRACT = {
    "GatedLoRALinear": lambda: Sample(
        _layer(), (torch.randn(2, 5, 6, generator=_rng(1)), torch.arange(10).reshape(2, 5) % 3 == 0)
    ),
    "MaskTokenLM": lambda: Sample(
        MaskTokenLM(_model(layers=1), 2, rank=2, generator=_rng()), (torch.tensor([[1, 2, 11, 12], [3, 11, 12, 4]]),)
    ),
    "MTPSampler": lambda: Sample(
        MTPSampler(6, 9, generator=_rng()), tuple(torch.randn(2, 3, 6, generator=_rng(i)) for i in (1, 2))
    ),
    "mtp_generate": lambda: Sample(
        mtp_generate,
        (*(part.float() for part in _lm(2)), _ids(2, 3), 6),
        {"sampler": Sampler(temperature=9.0)},
    ),
}


def test_reduces_to_linear() -> None:
    layer, x = _layer(), torch.randn(2, 5, 6, generator=_rng(2))
    plain = layer.base(x)
    gate = torch.arange(10).reshape(2, 5) % 3 == 0
    assert torch.equal(layer(x, gate), plain)  # B is zero
    nn.init.normal_(layer.lora_B, generator=_rng(3))
    found = layer(x, gate)
    assert torch.equal(found[~gate], plain[~gate])
    weight = layer.base.weight + 1.5 * layer.lora_B @ layer.lora_A
    expected = nn.functional.linear(x, weight, layer.base.bias)
    torch.testing.assert_close(found[gate], expected[gate])
    assert not torch.allclose(expected, plain)
    assert torch.equal(layer(x), plain)  # no gate is a closed one
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_sizes_and_scales_where_none_are_given() -> None:
    assert GatedLoRALinear(nn.Linear(3, 4), 5).scale == 1.0
    model = TinyLM(TinyLMConfig(vocab_size=VOCAB, d_model=64, layers=1, heads=2, hidden=16), generator=_rng())
    with torch.no_grad():
        model.embed_tokens.weight.mul_(7)
    lm = MaskTokenLM(model, generator=_rng(1))
    masks = lm.embed_tokens(torch.arange(VOCAB, VOCAB + lm.k)).detach()
    assert masks.shape == (8, 64)
    # they are spread as the model's own embeddings are: 512 numbers know it to 1 / sqrt(2 * 512)
    assert abs(float(masks.std() / model.embed_tokens.weight.detach().std()) - 1) < 4 / 32
    ranks = {p.shape[0] for name, p in lm.named_parameters() if name.endswith("lora_A")}
    assert ranks == {16}


def test_the_head_is_two_layers_and_reads_the_token_before_first() -> None:
    head = MTPSampler(6, 9, generator=_rng())
    previous, z = (torch.randn(2, 3, 6, generator=_rng(i)) for i in (1, 2))
    (a, b), (one, other) = head.layers, head.norms
    peer = nn.Sequential(a, nn.SiLU(), one, b, nn.SiLU(), other, head.out)
    torch.testing.assert_close(head(z, previous), peer(torch.cat([previous, z], -1)))


def test_real_tokens_see_the_frozen_model_to_the_bit_before_and_after_training() -> None:
    model, ids = _model(), _ids(4, 8)
    lm, head = MaskTokenLM(model, 3, rank=2, generator=_rng()), MTPSampler(12, VOCAB, generator=_rng(1))
    assert isinstance(lm, CausalLM)
    assert (lm.vocab_size, lm.max_length) == (VOCAB, 40)
    packed = mtp_training_batch(ids, 3, VOCAB)

    def real() -> Tensor:
        return lm(packed.ids, positions=packed.positions, tree=packed.tree).logits[:, ~packed.gate]

    before, masks = real(), lm(packed.ids).logits[:, packed.gate]
    torch.testing.assert_close(before, model(ids).logits)
    parts = nn.ModuleList([lm, head])
    optimiser = torch.optim.Adam([p for p in parts.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(6):
        loss = mtp_loss(lm, head, ids).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(real(), before)
    assert torch.equal(lm(ids).logits, model(ids).logits)
    assert not torch.allclose(lm(packed.ids).logits[:, packed.gate], masks)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), _model().parameters(), strict=True))


def test_one_packed_pass_is_a_pass_for_each_beginning_with_its_masks() -> None:
    k, ids = 3, _ids(2, 5)
    lm, _ = _lm(k)
    packed = mtp_training_batch(ids, k, VOCAB)
    logits = lm(packed.ids, positions=packed.positions, tree=packed.tree).logits
    masks = torch.arange(VOCAB, VOCAB + k).expand(2, k)
    for i in range(5):
        alone = lm(torch.cat([ids[:, : i + 1], masks], 1)).logits[:, i:]
        torch.testing.assert_close(logits[:, i * (k + 1) : (i + 1) * (k + 1)], alone)


def test_masks_stand_for_the_tokens_after_the_next() -> None:
    ids = torch.tensor([[10, 20, 30, 40]])
    packed = mtp_training_batch(ids, 2, 100)
    assert packed.ids.tolist() == [[10, 100, 101, 20, 100, 101, 30, 100, 101, 40, 100, 101]]
    assert packed.positions.tolist() == [0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5]
    assert packed.gate.tolist() == [False, True, True] * 4
    assert packed.targets.tolist() == [[20, 30, 40, 30, 40, -100, 40, -100, -100, -100, -100, -100]]
    assert packed.anchors.tolist() == [0, 3, 6, 3, 6, 5, 6, 7, 8, 9, 10, 11]


def test_the_losses_are_those_of_passes_for_each_beginning() -> None:
    k, ids = 2, _ids(2, 4)
    lm, head = _lm(k)
    found = mtp_loss(lm, head, ids)
    real = lm(ids, hidden_states=True).hidden_states
    assert real is not None
    terms: list[list[Tensor]] = [[], [], []]
    for i in range(4):
        text = torch.cat([ids[:, : i + 1], torch.arange(VOCAB, VOCAB + k).expand(2, k)], 1)
        out = lm(text, hidden_states=True)
        assert out.hidden_states is not None
        for j in range(1, k + 1):
            if i + j + 1 < 4:
                target, z = ids[:, i + j + 1], out.hidden_states[-1][:, i + j]
                terms[0].append(nn.functional.cross_entropy(out.logits[:, i + j], target))
                terms[1].append(nn.functional.cross_entropy(head(z, lm.embed_tokens(ids[:, i + j])), target))
                terms[2].append(((z - real[-1][:, i + j]) ** 2).mean())
    expected = [torch.stack(each).mean() for each in terms]
    for one, other in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.total, torch.stack(expected).sum())


def test_the_anchor_gets_no_gradient() -> None:
    z, anchor = (torch.randn(3, 4, generator=_rng(i)).requires_grad_() for i in (1, 2))
    loss = latent_consistency_loss(z, anchor)
    torch.testing.assert_close(loss, ((z - anchor) ** 2).sum(-1) / 4)
    loss.sum().backward()
    assert anchor.grad is None
    torch.testing.assert_close(z.grad, (z - anchor).detach() / 2)
    assert float(latent_consistency_loss(z, z.detach()).sum().detach()) == 0
    assert latent_consistency_loss(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("mode", ["quadratic", "linear"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_greedy_tokens_are_those_of_plain_decoding(mode: Any, k: int) -> None:
    lm, head = _lm(k)
    model, ids = _model().double(), _ids()
    expected = generate(model, ids, 12, stop_tokens=[2])
    found = mtp_generate(lm, head, ids, 12, mode=mode, stop_tokens=[2])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.target_calls <= expected.target_calls


class _Oracle(MTPSampler):
    """Guesses what plain decoding says, with every n-th guess wrong; it counts what it is asked."""

    def __init__(self, text: list[int], start: int, wrong: set[int]) -> None:
        super().__init__(12, VOCAB)
        self.text, self.at, self.wrong = text, start, wrong

    def forward(self, z: Tensor, previous: Tensor) -> Tensor:
        self.at += 1
        token = self.text[min(self.at, len(self.text) - 1)]
        return nn.functional.one_hot(torch.tensor([token if self.at not in self.wrong else (token + 1) % VOCAB]), VOCAB)


def _steps(mode: Any, wrong: set[int]) -> tuple[list[int], list[int]]:
    """Accepted and offered guesses of each pass but the last, with a head that knows the text."""
    lm, _ = _lm(3)
    ids = _ids(1)
    text = generate(_model().double(), ids, 21).row(0).tolist()

    class Following(_Oracle):
        """Told by the length of the text so far where its guesses begin."""

    head = Following(text, 0, wrong)
    passes = []

    def forward(z: Tensor, previous: Tensor) -> Tensor:
        passes.append(z)
        return _Oracle.forward(head, z, previous)

    head.forward = forward  # type: ignore[method-assign]
    from mlreviews.decoding import gated_lora_mtp as module

    learn = module._Guesser.verdicts
    done = [1]  # tokens so far; the first comes from the prompt's pass

    def verdicts(self: Any, logits: Tensor, drafted: Any, previous: Any) -> Any:
        rule = self.rule

        def counted(*arguments: Any) -> Any:
            found = rule(*arguments)
            done[0] += len(found[0][0])
            head.at = done[0] - 1
            return found

        self.rule = counted
        found = learn(self, logits, drafted, previous)
        self.rule = rule
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Guesser, "verdicts", verdicts)
        found = mtp_generate(lm, head, ids, 21, mode=mode)
    assert found.row(0).tolist() == text
    assert found.accepted is not None
    assert found.drafted is not None
    return found.accepted[:, 0].tolist(), found.drafted[:, 0].tolist()


def test_right_guesses_are_all_taken_in_both_modes() -> None:
    for mode in ("quadratic", "linear"):
        accepted, offered = _steps(mode, set())
        assert accepted[:5] == [0, 3, 3, 3, 3]
        assert offered[:5] == [0, 3, 3, 3, 3]


def test_after_a_refusal_quadratic_decoding_still_has_k_guesses_and_linear_none() -> None:
    wrong = {2, 7}  # the first guess of the first three, and one later
    accepted, offered = _steps("quadratic", wrong)
    assert offered[:5] == [0, 3, 3, 3, 3]
    assert accepted[1] == 0
    linear_accepted, linear_offered = _steps("linear", wrong)
    assert linear_offered[:3] == [0, 3, 0]
    assert len(accepted) <= len(linear_accepted)


@pytest.mark.parametrize(
    ("mode", "sampler"),
    [("quadratic", Sampler(temperature=0.7, top_k=2)), ("linear", Sampler(temperature=1.0, top_p=0.8))],
)
def test_the_law_is_the_model_s(mode: Any, sampler: Sampler) -> None:
    lm, head = _lm(2, vocab=3)
    model: Any = _model(3).double()
    ids = torch.tensor([[0, 1]])
    found = exact_law(lambda: mtp_generate(lm, head, ids, 3, mode=mode, sampler=sampler).tokens)
    assert_same_law(found, law_of_chain(model, ids, 3, sampler))


def test_padding_and_penalties_change_nothing() -> None:
    lm, head = _lm(2)
    model, ids = _model().double(), _ids(1, 6)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1), torch.arange(9)[None] >= 3
    for sampler in (Sampler(), Sampler(repetition_penalty=1.5)):
        expected = generate(model, ids, 9, sampler=sampler).tokens
        assert torch.equal(mtp_generate(lm, head, padded, 9, mask=mask, sampler=sampler).tokens, expected)


def test_transformers_models_take_it() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = from_transformers(LlamaForCausalLM(config).double().eval())
    lm = MaskTokenLM(model, 2, rank=2, generator=_rng())
    ids = _ids(2)
    assert torch.equal(lm(ids).logits, model(ids).logits)
    expected = generate(model, ids, 8).tokens
    assert torch.equal(mtp_generate(lm, MTPSampler(12, VOCAB).double(), ids, 8).tokens, expected)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    lm, head = _lm(2)
    with pytest.raises(ValueError, match="k: expected"):
        MaskTokenLM(_model(), 0)
    with pytest.raises(ValueError, match="rank"):
        MaskTokenLM(_model(), rank=0)
    with pytest.raises(ValueError, match="rank"):
        GatedLoRALinear(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="d_model"):
        MTPSampler(0, 3)
    with pytest.raises(ValueError, match="vocab_size"):
        MTPSampler(3, 0)
    with pytest.raises(ValueError, match="mode"):
        mtp_generate(lm, head, _ids(), 3, mode="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids"):
        mtp_loss(lm, head, _ids(1, 2))
    with pytest.raises(ValueError, match="ids"):
        mtp_training_batch(_ids(1, 0), 2, VOCAB)
    with pytest.raises(ValueError, match="k: expected"):
        mtp_training_batch(_ids(), 0, VOCAB)
    headless = _model()
    headless.embed_tokens = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Embedding"):
        MaskTokenLM(headless)
