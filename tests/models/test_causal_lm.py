from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mlreviews.models import CausalLM, TinyLM, TinyLMConfig, TransformersLM, from_transformers, load_pretrained
from mlreviews_kernels.tree_masked_attention import ancestor_mask

VOCAB, BATCH, TIME = 19, 2, 9
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = ("llama", "gpt2", "qwen2")


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _peer(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "gpt2":
            peer: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=6, n_positions=64))
        elif kind == "llama":
            peer = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
        else:
            peer = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS))
        with torch.no_grad():
            for parameter in peer.parameters():  # the initial weights hardly let tokens see each other
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return peer.eval().double()


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> TransformersLM:
    return from_transformers(_peer(request.param))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def _ids(time: int = TIME, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (BATCH, time), generator=_rng(seed))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # transformers' norms and angles are in float32


def test_logits_and_hidden_states_are_the_model_s(model: TransformersLM) -> None:
    out = model(_ids(), hidden_states=True)
    expected = model.model(_ids(), output_hidden_states=True)
    _close(out.logits, expected.logits)
    assert out.hidden_states is not None
    assert len(out.hidden_states) == 4
    for found, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        _close(found, wanted)
    _close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(_ids()).hidden_states is None
    assert isinstance(model, CausalLM)
    assert (model.vocab_size, model.max_length, model.embed_tokens.num_embeddings) == (VOCAB, 64, VOCAB)
    # DoLa and EAGLE take hidden states before the norm through it
    seen: list[Tensor] = []
    hook = model.norm.register_forward_hook(lambda _, __, y: seen.append(y))
    model(_ids())
    hook.remove()
    _close(seen[0], out.hidden_states[-1])


def test_cropped_cache_is_a_fresh_prefill_and_the_old_one_stays(model: TransformersLM) -> None:
    ids, other = _ids(), _ids(3, seed=2)
    whole = model(ids)
    assert whole.cache.length == TIME
    before = [layer.keys.clone() for layer in whole.cache.layers]
    for length in (1, 4, TIME):
        found = model(other, whole.cache.crop(length))
        _close(found.logits, model(torch.cat([ids[:, :length], other], 1)).logits[:, length:])
        assert found.cache.length == length + 3
    assert all(map(torch.equal, before, [layer.keys for layer in whole.cache.layers]))


def test_rows_and_kept_tokens(model: TransformersLM) -> None:
    ids, last = _ids(), _ids(2, seed=2)
    cache = model(ids).cache
    index = torch.tensor([1, 0, 1])
    _close(model(last[index], cache.rows(index)).logits, model(torch.cat([ids, last], 1)[index]).logits[:, TIME:])
    # row 0 keeps two of the tokens from 6 on, row 1 only the first; the hole counts for nothing
    kept = cache.keep(6, torch.tensor([[0, 1], [0, 0]]), torch.tensor([[True, True], [True, False]]))
    positions = torch.tensor([[8, 9], [7, 8]])
    found = model(last, kept, positions=positions).logits
    for row, length in enumerate([8, 7]):
        alone = torch.cat([ids[row, :length], last[row]])[None]
        _close(found[row], model(alone).logits[0, length:])


def test_padding_on_the_left_changes_nothing(model: TransformersLM) -> None:
    ids, mask = _ids(), torch.arange(TIME) >= torch.tensor([[0], [4]])
    out = model(ids, mask=mask)
    after = model(ids[:, :2], out.cache).logits
    for row, start in enumerate([0, 4]):
        alone = model(torch.cat([ids[row, start:], ids[row, :2]])[None]).logits[0]
        _close(out.logits[row, start:], alone[:-2])
        _close(after[row], alone[-2:])
    # a hole after a prompt, with padding before it or without
    for before, starts in ((out.cache, [0, 4]), (model(ids).cache, [0, 0])):
        holed = model(ids[:, :2], before, mask=torch.tensor([[True, True], [False, True]])).logits
        for row, start in enumerate(starts):
            alone = model(torch.cat([ids[row, start:], ids[row, row:2]])[None]).logits[0]
            _close(holed[row, row:], alone[TIME - start :])


def test_branches_of_a_tree_are_what_they_are_alone(model: TransformersLM) -> None:
    ids, nodes = _ids(), _ids(4, seed=2)
    tree, depth = ancestor_mask(torch.tensor([-1, 0, 0, 2])), torch.tensor([0, 1, 1, 2])
    out = model(nodes, model(ids).cache, tree=tree, positions=TIME + depth)
    for path in ([0, 1], [0, 2, 3]):
        alone = model(torch.cat([ids, nodes[:, path]], 1))
        _close(out.logits[:, path], alone.logits[:, TIME:])
    kept = out.cache.keep(TIME, torch.tensor([[0, 2, 3]] * BATCH))
    _close(model(nodes, kept).logits, model(torch.cat([ids, nodes[:, [0, 2, 3]], nodes], 1)).logits[:, TIME + 3 :])


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    model, ids = from_transformers(_peer("llama")), _ids()
    with pytest.raises(ValueError, match=r"ids: expected \[batch, time\] with no empty axis"):
        model(ids[:, :0])
    cache = model(ids).cache
    with pytest.raises(ValueError, match="cache: expected a state for each of 3 layers, got 2"):
        model(ids, cache._replace(layers=cache.layers[:2]))
    with pytest.raises(ValueError, match=r"cache: expected keys \[batch, time, 2, 4\], got \[2, 9, 6, 4\]"):
        model(ids, from_transformers(_peer("gpt2"))(ids).cache)
    with pytest.raises(ValueError, match="length: expected 0 to 9"):
        cache.crop(10)
    for other in (nn.Linear(2, 3), _peer("llama").model):
        with pytest.raises(TypeError, match="model: expected a causal language model of transformers, got"):
            from_transformers(other)
    sliding: Any = Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    whole = MistralConfig(**SIZES, **HEADS, sliding_window=None)
    for other in (Qwen2ForCausalLM(sliding), MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=4))):
        with pytest.raises(TypeError, match="model: expected layers of full attention alone, got sliding_attention"):
            from_transformers(other)
    assert from_transformers(MistralForCausalLM(whole)).vocab_size == VOCAB


def test_shipped_models_and_folders(tmp_path: Path) -> None:
    draft = 250_000
    for name, least in (("python-target", 3_000_000), ("python-draft", draft), ("python-draft-distilled", draft)):
        model = load_pretrained(name)
        assert not model.training
        assert least < sum(p.numel() for p in model.parameters()) < 1.3 * least
        assert (model.vocab_size, model.max_length) == (259, 1024)
        assert isinstance(model, CausalLM)
    TinyLM(TinyLMConfig(vocab_size=5, d_model=8, layers=1, heads=2)).save(tmp_path / "own")
    assert load_pretrained(str(tmp_path / "own")).vocab_size == 5
    with pytest.raises(ValueError, match=r"name: expected one of .*python-target.*, got 'python'"):
        load_pretrained("python")
