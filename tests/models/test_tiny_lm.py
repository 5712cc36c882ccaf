import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mlreviews.models import CausalAttention, KVCache, LMCache, TinyLM, TinyLMConfig
from mlreviews_kernels.tree_masked_attention import ancestor_mask

CONFIG = TinyLMConfig(vocab_size=17, d_model=12, layers=3, heads=6, kv_heads=2, hidden=20)
BATCH, TIME = 3, 8


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(config: TinyLMConfig = CONFIG, **options: Any) -> TinyLM:
    return TinyLM(config, generator=_rng(), **options).double()


def _ids(time: int = TIME) -> Tensor:
    return torch.randint(17, (BATCH, time), generator=_rng(1))


class Counting(nn.Module):
    """Position embedding by table; the state is a cache of as many tokens as it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(32, 12, generator=_rng(4)))

    def forward(self, ids: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache]:
        start = 0 if state is None else state.length
        seen = torch.zeros(len(ids), start + ids.shape[1], 1, 1)
        return self.table[start : start + ids.shape[1]].expand(len(ids), -1, -1), KVCache(seen, seen)


class Carrying(CausalAttention):
    """Adds what the block before gave, and hands on its own output."""

    cross_layer = True

    def forward(self, x: Tensor, state: Any = None, *, carried: Any = None, **layout: Any) -> Any:
        y, state = super().forward(x, state, **layout)
        y = y if carried is None else y + carried
        return y, state, y


@pytest.mark.parametrize("tied", [True, False])
def test_is_a_llama(tied: bool) -> None:
    # heads of four entries, for those of two have no base, and an eps that is felt
    config = TinyLMConfig(**{**CONFIG.__dict__, "tied": tied, "heads": 3, "kv_heads": 1, "norm_eps": 0.03})
    model = _model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=_rng(2)))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            rms_norm_eps=0.03,
            rope_theta=10000.0,
            tie_word_embeddings=tied,
        )
    ).double()
    names = {name: name if name.startswith("lm_head") else "model." + name for name in model.state_dict()}
    llama.load_state_dict({names[name]: x for name, x in model.state_dict().items()})
    out = model(_ids(), hidden_states=True)
    expected = llama(_ids(), output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)  # its rotary angles are in float32
    assert out.hidden_states is not None
    torch.testing.assert_close(out.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # another path
        torch.testing.assert_close(model(_ids()).logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@pytest.mark.parametrize("attention", [CausalAttention, Carrying])
@pytest.mark.parametrize("cut", [1, 3, TIME - 1])
def test_parts_equal_the_whole(cut: int, attention: type[CausalAttention]) -> None:
    model, ids = _model(attention=attention, position_embedding=Counting()), _ids()
    whole = model(ids)
    first = model(ids[:, :cut])
    second = model(ids[:, cut:], first.cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
    torch.testing.assert_close(second.cache, whole.cache)
    assert whole.cache.length == TIME
    torch.testing.assert_close(second.cache.crop(cut), first.cache)
    torch.testing.assert_close(model(ids[:, cut:], second.cache.crop(cut)).logits, second.logits)


def test_values_carried_between_blocks_arrive() -> None:
    assert not torch.allclose(_model(attention=Carrying)(_ids()).logits, _model()(_ids()).logits)


def test_rows_are_reordered_and_branched() -> None:
    model, ids = _model(position_embedding=Counting()), _ids()
    index = torch.tensor([2, 0, 0, 1])
    found = model(ids[index, 5:], model(ids[:, :5]).cache.rows(index)).logits
    torch.testing.assert_close(found, model(ids).logits[index, 5:])


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = _model(), _ids()
    mask = torch.arange(TIME) >= torch.tensor([0, 2, 5])[:, None]
    out = model(ids, mask=mask)
    after = model(ids[:, :2], out.cache).logits
    for row, start in enumerate([0, 2, 5]):
        alone = torch.cat([ids[row : row + 1, start:], ids[row : row + 1, :2]], 1)
        expected = model(alone).logits[0]
        torch.testing.assert_close(out.logits[row, start:], expected[:-2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[row], expected[-2:], rtol=1e-5, atol=1e-5)
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("gradients", [True, False])  # without them, few queries take another path
@pytest.mark.parametrize("padded", [True, False])
def test_branches_of_a_tree_are_what_they_are_alone(gradients: bool, padded: bool) -> None:
    model, ids = _model(), _ids()
    starts = [0, 3, 5] if padded else [0, 0, 0]
    mask = torch.arange(TIME) >= torch.tensor(starts)[:, None] if padded else None
    nodes = torch.randint(17, (BATCH, 5), generator=_rng(7))
    parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, -1, 1, 1, 3], [-1, 0, 1, 2, 3]])
    paths = [[[0, 1, 3], [0, 2, 4]], [[0], [1, 2], [1, 3, 4]], [[0, 1, 2, 3, 4]]]
    tree = ancestor_mask(parents)
    with torch.set_grad_enabled(gradients):
        cache = model(ids, mask=mask).cache
        out = model(nodes, cache, tree=tree, positions=TIME - 1 + tree.sum(2))
        for row, start in enumerate(starts):
            for path in paths[row]:
                alone = model(torch.cat([ids[row, start:], nodes[row, path]])[None]).logits[0]
                torch.testing.assert_close(
                    out.logits[row, path], alone[TIME - start :], rtol=1e-5, atol=1e-5
                )  # angles are in float32
        # one tree for all rows
        alike = model(nodes, cache, tree=tree[0], positions=TIME - 1 + tree[0].sum(1))
        torch.testing.assert_close(alike.logits[0], out.logits[0])


@pytest.mark.parametrize("gradients", [True, False])
def test_kept_tokens_are_as_if_the_others_had_never_come(gradients: bool) -> None:
    model, ids, last = _model(), _ids(), torch.randint(17, (BATCH, 3), generator=_rng(7))
    with torch.set_grad_enabled(gradients):
        cache = model(ids).cache
        lengths = torch.tensor([2, 1, 3])
        index = torch.tensor([[1, 2, 0], [0, 0, 0], [0, 1, 2]])
        kept = cache.keep(5, index, torch.arange(3) < lengths[:, None])
        assert (kept.length, cache.length) == (8, TIME)
        # tokens 6 and 7 of row 0 were seen at the places they have now, one to the left
        found = model(last, kept, positions=torch.tensor([[8], [6], [8]]) + torch.arange(3)).logits
        whole = [torch.cat([ids[1, :6], last[1]]), torch.cat([ids[2], last[2]])]
        for row, alone in enumerate(whole, start=1):
            torch.testing.assert_close(found[row], model(alone[None]).logits[0, -3:], rtol=1e-5, atol=1e-5)
        # row 0 has left token 5 out: nothing of it is there, whatever it was
        other = KVCache(*(x.clone() if x is not None else None for x in cache.layers[0]))  # type: ignore[arg-type]
        other.keys[0, 5] = other.values[0, 5] = 99.0
        changed = LMCache((other, *cache.layers[1:])).keep(5, index, torch.arange(3) < lengths[:, None])
        again = model(last, changed, positions=torch.tensor([[8], [6], [8]]) + torch.arange(3)).logits
        torch.testing.assert_close(again[0], found[0])


def test_few_queries_without_gradients_give_what_others_do() -> None:
    model, ids = _model(position_embedding=None), _ids(11)
    mask = torch.arange(11) >= torch.tensor([0, 4, 10])[:, None]
    for given in (None, mask):
        cut = None if given is None else given[:, :8]
        expected = model(ids, mask=given).logits
        with torch.no_grad():
            cache = model(ids[:, :8], mask=cut).cache
            found = model(ids[:, 8:], cache, mask=None if given is None else given[:, 8:])
        seen = slice(8, None) if given is None else mask & (torch.arange(11) >= 8)
        want = expected[:, seen] if given is None else expected[seen]
        have = found.logits if given is None else found.logits[mask[:, 8:]]
        torch.testing.assert_close(have, want)
        assert found.logits.isfinite().all()


def test_a_pass_shares_angles_only_between_layers_of_one_kind() -> None:
    model, ids = _model(), _ids()
    expected = model(ids).logits
    model.layers[1].self_attn.rope_base = None
    changed = model(ids).logits
    assert not torch.allclose(changed, expected)
    x = model.embed_tokens(ids)
    for block in model.layers:
        x, _, _ = block(x, None, None, {})
    torch.testing.assert_close(changed, model.lm_head(model.norm(x)))


def test_the_attention_is_one_argument() -> None:
    model = _model(attention=partial(CausalAttention, rope_base=None))
    assert [(b.self_attn.layer, b.self_attn.kv_heads, b.self_attn.rope_base) for b in model.layers] == [
        (0, 2, None),
        (1, 2, None),
        (2, 2, None),
    ]


def test_learns_a_sequence() -> None:
    ids = _ids().repeat(1, 4)
    model = TinyLM(CONFIG, generator=_rng())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.5


def test_default_sizes() -> None:
    model = TinyLM.from_config({"d_model": 48, "layers": 1}, generator=_rng())
    assert model.layers[0].mlp.up_proj.weight.shape == (128, 48)
    assert TinyLM.from_config({"d_model": 52, "layers": 1, "heads": 2}).layers[0].mlp.gate_proj.weight.shape == (
        144,
        52,
    )
    assert model.config == TinyLMConfig(259, 48, 1, 4, None, None, 1e-6, True)
    # a tied head sees a normed vector: logits of unit variance
    wide = TinyLM(TinyLMConfig(d_model=512, layers=1), generator=_rng())
    assert 0.9 < wide(torch.arange(64)[None]).logits.std() < 1.1


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path: Path, tied: bool) -> None:
    model = TinyLM(TinyLMConfig(**{**CONFIG.__dict__, "tied": tied}), partial(CausalAttention, rope_base=None))
    model.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hidden"] == 20
    loaded = TinyLM.load(tmp_path / "model", attention=partial(CausalAttention, rope_base=None))
    assert torch.equal(loaded(_ids()).logits, model(_ids()).logits)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    with pytest.raises(FileNotFoundError):
        TinyLM.load(tmp_path)


def test_the_generator_decides_the_weights() -> None:
    before = torch.get_rng_state()
    assert all(map(torch.equal, _model().parameters(), _model().parameters()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    model, ids = _model(), _ids()
    with pytest.raises(TypeError, match="ids: expected int64 or int32, got torch"):
        model(ids.float())
    for bad in (ids[0], ids[:, :0]):
        with pytest.raises(ValueError, match=r"ids: expected \[batch, time\]"):
            model(bad)
    with pytest.raises(IndexError):
        model(ids + 17)
    with pytest.raises(ValueError, match="cache: expected a state for each of 3 blocks, got 2"):
        model(ids, LMCache(model(ids).cache.layers[:2]))
    with pytest.raises(TypeError, match=r"cache: a state of type Tensor has no crop\(\)"):
        LMCache((torch.zeros(2, 3),)).crop(1)
    for options, match in (({"heads": 0}, "heads"), ({"kv_heads": 0}, "kv_heads"), ({"norm_eps": 0.0}, "norm_eps")):
        with pytest.raises(ValueError, match=f"{match}: expected"):
            TinyLMConfig(**options)
    with pytest.raises(TypeError, match="width"):
        TinyLM.from_config({"width": 3})
