from typing import Any

import pytest
import torch
from torch import Tensor

from mlreviews.attention.memlong import ChunkMemory, MemLongAttention, freeze_below, retrieval_attention
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from tests.contracts.families import Sample

DIM, HEADS, KV_HEADS, BATCH, CHUNK = 12, 6, 3, 2, 4


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(kind: Any = MemLongAttention, **options: Any) -> Any:
    if kind is MemLongAttention:
        options = {"chunk_size": CHUNK, "top_k": 2, **options}
    return kind(DIM, HEADS, kv_heads=KV_HEADS, generator=_rng(), **options).double()


def _x(time: int, seed: int = 1) -> Tensor:
    return torch.randn(BATCH, time, DIM, dtype=torch.float64, generator=_rng(seed))


def _memory(chunks: int, capacity: int = 99, **options: Any) -> ChunkMemory:
    """Chunk i has the i-th unit vector as its embedding, and keys and values of i."""
    shape = (BATCH, CHUNK, 1, 2)
    memory = ChunkMemory.empty(torch.zeros(BATCH, 20), torch.zeros(shape), torch.zeros(shape))
    for i in range(chunks):
        content = torch.full(shape, float(i))
        mask = torch.ones(BATCH, CHUNK, dtype=torch.bool)
        memory = memory.add(_unit(i) * (i + 1), content, -content, mask, capacity=capacity, **options)
    return memory


def _unit(*places: int) -> Tensor:
    """A query for one chunk in all rows, or for another one in each."""
    rows = places * BATCH if len(places) == 1 else places
    return torch.eye(20)[list(rows)]


CONTRACT = {
    "MemLongAttention": lambda: Sample(
        MemLongAttention(8, 2, chunk_size=16, top_k=1, generator=_rng()),  # nothing is frozen or moved by padding
        (torch.randn(2, 9, 8, generator=_rng(1)),),
    ),
}


def test_search_finds_the_nearest_chunks_in_order_and_counts_them() -> None:
    memory = _memory(6)
    keys, values, mask, found, after = memory.search(_unit(4) + 0.5 * _unit(1), 2)
    assert found.tolist() == [[1, 4]] * BATCH
    assert keys[0, :, 0, 0].tolist() == [1.0] * CHUNK + [4.0] * CHUNK
    assert torch.equal(values, -keys)
    assert mask.shape == (BATCH, 2 * CHUNK)
    assert after.counts.tolist() == [[0, 1, 0, 0, 1, 0]] * BATCH
    assert memory.counts.sum() == 0
    assert memory.search(_unit(3, 5), 1)[3].tolist() == [[3], [5]]
    assert memory.search(_unit(0), 9)[3].shape == (BATCH, 6)
    # a cosine: the length of the query has no say, and that of the stored embedding neither
    assert memory.search(1e-3 * _unit(0) + 0.9e-3 * _unit(5), 1)[3].tolist() == [[0]] * BATCH


def test_never_more_than_the_capacity() -> None:
    for capacity, evict in ((5, 0.1), (5, 0.6), (5, 1.0), (1, 0.1)):
        memory = _memory(0)
        for _ in range(13):
            memory = _memory_plus(memory, capacity, evict)
            assert memory.chunks <= capacity
    assert _memory(13, 10, evict=0.3).chunks == 10
    assert _memory(11, 10, evict=0.3).chunks == 8
    assert _memory(11, 10).chunks == 10


def _memory_plus(memory: ChunkMemory, capacity: int, evict: float) -> ChunkMemory:
    new = torch.zeros(BATCH, CHUNK, 1, 2)
    mask = torch.ones(BATCH, CHUNK, dtype=torch.bool)
    return memory.add(_unit(0), new, new, mask, capacity=capacity, evict=evict)


def test_the_least_retrieved_are_forgotten_the_older_first_and_the_newest_last() -> None:
    memory = _memory(12)
    for query in (_unit(0), _unit(0), _unit(2, 3), _unit(4)):
        memory = memory.search(query, 1)[4]
    places = memory.forget(4).keys[:, :, 0, 0, 0].tolist()
    assert places == [[0, 2, 4, 7, 8, 9, 10, 11], [0, 3, 4, 7, 8, 9, 10, 11]]
    last = memory.forget(9).keys[:, :, 0, 0, 0].tolist()
    assert last == [[0, 10, 11], [0, 10, 11]]
    assert memory.forget(0).chunks == 12
    assert memory.forget(12).chunks == 0


@pytest.mark.parametrize("time", [1, CHUNK, 2 * CHUNK])
def test_reduces_to_causal_attention_while_all_is_local(time: int) -> None:
    layer = _layer()
    torch.testing.assert_close(layer(_x(time))[0], _layer(CausalAttention)(_x(time))[0])


def test_reduces_to_causal_attention_without_positions_when_every_chunk_is_retrieved() -> None:
    x = _x(5 * CHUNK + 3)
    found = _layer(rope_base=None, top_k=99)(x)[0]
    torch.testing.assert_close(found, _layer(CausalAttention, rope_base=None)(x)[0])
    assert not torch.allclose(found, _layer(rope_base=None, top_k=1)(x)[0])


def test_without_retrieval_two_chunks_are_seen() -> None:
    layer, x = _layer(top_k=0), _x(4 * CHUNK)
    y = layer(x)[0]
    torch.testing.assert_close(y[:, 2 * CHUNK :], layer(x[:, CHUNK:])[0][:, CHUNK:])
    near = CausalAttention.forward(_layer(CausalAttention), x[:, 2 * CHUNK :])[0]
    torch.testing.assert_close(y[:, 3 * CHUNK :], near[:, CHUNK:])


@pytest.mark.parametrize("gate", [False, True])
def test_the_layer_is_its_equation(gate: bool) -> None:
    """A query of the fifth chunk by hand: chunks 0 to 2 are in the memory, and the fourth's mean asks for one."""
    layer, x = _layer(gate=gate, top_k=1), _x(5 * CHUNK)
    if gate:
        with torch.no_grad():
            layer.gate.copy_(torch.randn(HEADS, generator=_rng(3)))
    y, state = layer(x)
    assert state.memory.chunks == 3
    means = x.unflatten(1, (5, CHUNK)).mean(2)
    t = 4 * CHUNK + 1
    q = layer.q_proj(x[:, t]).view(BATCH, HEADS, 2)
    k, v = (p(x).view(BATCH, -1, KV_HEADS, 2).repeat_interleave(2, 2) for p in (layer.k_proj, layer.v_proj))
    rotated_q, rotated_k, _ = layer.project(x, 0)
    rotated_k = rotated_k.repeat_interleave(2, 2)
    for row in range(BATCH):
        cosines = [torch.cosine_similarity(means[row, 3], means[row, c], dim=0) for c in range(3)]
        best = int(torch.stack(cosines).argmax())
        far, near = slice(best * CHUNK, (best + 1) * CHUNK), slice(3 * CHUNK, t + 1)
        heads = []
        for head in range(HEADS):
            far_scores = k[row, far, head] @ q[row, head] / 2**0.5
            near_scores = rotated_k[row, near, head] @ rotated_q[row, t, head] / 2**0.5
            if gate:
                share = torch.sigmoid(layer.gate[head])
                heads.append(
                    share * far_scores.softmax(0) @ v[row, far, head]
                    + (1 - share) * near_scores.softmax(0) @ v[row, near, head]
                )
            else:
                weights = torch.cat([far_scores, near_scores]).softmax(0)
                heads.append(weights @ torch.cat([v[row, far, head], v[row, near, head]]))
        torch.testing.assert_close(y[row, t], layer.o_proj(torch.cat(heads)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, CHUNK - 1, CHUNK, 2 * CHUNK, 3 * CHUNK + 1, 17])
def test_parts_equal_the_whole_across_chunks(cut: int) -> None:
    layer, x = _layer(capacity=2), _x(18)
    mask = torch.ones(BATCH, 18, dtype=torch.bool)
    mask[1, :6] = False
    whole, end = layer(x, mask=mask)
    first, state = layer(x[:, :cut], mask=mask[:, :cut])
    second, last = layer(x[:, cut:], state, mask=mask[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, end)
    assert end.length == 18
    assert end.memory.chunks == 2
    index = torch.tensor([1, 1, 0])
    torch.testing.assert_close(layer(x[index, cut:], state.rows(index), mask=mask[index, cut:])[0], whole[index, cut:])


def test_no_token_sees_a_later_one_through_what_is_retrieved() -> None:
    layer, x = _layer(), _x(7 * CHUNK)
    whole = layer(x)[0]
    for t in (5, 12, 15, 16, 21):
        other = torch.cat([x[:, :t], _x(7 * CHUNK - t, seed=9)], 1)
        torch.testing.assert_close(layer(other)[0][:, :t], whole[:, :t])


def test_what_is_stored_is_frozen() -> None:
    layer, x = _layer(), _x(5 * CHUNK).requires_grad_()
    y, state = layer(x)
    assert not any(t.requires_grad for t in (*state.memory, *state.found))
    (gradient,) = torch.autograd.grad(y[:, -1].sum(), x)
    assert gradient[:, : 3 * CHUNK].abs().max() == 0
    assert gradient[:, 3 * CHUNK :].abs().amin() > 0


def test_gates() -> None:
    q, k, v, memory_q = (torch.randn(BATCH, 3, HEADS, 2, generator=_rng(i)) for i in range(4))
    far = torch.randn(2, BATCH, 5, HEADS, 2, generator=_rng(7)).unbind()
    local = retrieval_attention(q, k, v, memory_q, *(x[:, :0] for x in far))
    closed = torch.full((HEADS,), float("-inf"))
    torch.testing.assert_close(retrieval_attention(q, k, v, memory_q, *far, gate=closed), local)
    alone = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (memory_q, *far)))
    found = retrieval_attention(q, k, v, memory_q, *far, gate=-closed)
    torch.testing.assert_close(found, alone.transpose(1, 2))
    hidden = torch.zeros(BATCH, 5, dtype=torch.bool)
    for gate in (None, torch.zeros(HEADS)):
        torch.testing.assert_close(retrieval_attention(q, k, v, memory_q, *far, memory_mask=hidden, gate=gate), local)


def test_padding_is_not_part_of_an_embedding() -> None:
    layer, x = _layer(), _x(3 * CHUNK + 1)
    mask = torch.ones(BATCH, 3 * CHUNK + 1, dtype=torch.bool)
    mask[0, :3] = False
    memory = layer(x, mask=mask)[1].memory
    for row, begin in ((0, 3), (1, 0)):
        mean = x[row, begin:CHUNK].mean(0)
        torch.testing.assert_close(memory.embeddings[row, 0], mean / mean.norm())
    assert memory.mask[:, 0].tolist() == [[False] * 3 + [True], [True] * 4]


def test_lower_blocks_can_be_frozen() -> None:
    model = TinyLM(TinyLMConfig(d_model=8, layers=3, heads=2, tied=False), generator=_rng())
    freeze_below(model, 2)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and "layers" in name}
    assert trained == {"2"}
    assert not model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="layer: expected 0 to 3"):
            freeze_below(model, layer)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    for options, match in (
        ({"chunk_size": 0}, "chunk_size: expected at least 1"),
        ({"top_k": -1}, "top_k: expected at least 0"),
        ({"capacity": 0}, "capacity: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            _layer(**options)
    memory = _memory(3)
    with pytest.raises(ValueError, match="number: expected 0 to 3"):
        memory.forget(4)
    with pytest.raises(ValueError, match="capacity: expected at least 1"):
        _memory(1, 0)
    with pytest.raises(ValueError, match="evict: expected 0 to 1, got"):
        _memory(1, evict=1.5)
    layer = _layer()
    with pytest.raises(ValueError, match="state: expected that of"):
        layer(_x(3)[:1], layer(_x(3))[1])
    assert (layer.chunk_size, MemLongAttention(8, 2).chunk_size, MemLongAttention(8, 2).top_k) == (CHUNK, 32, 4)
    assert MemLongAttention(8, 2).capacity == 1024
    assert (MemLongAttention(8, 2).layer, MemLongAttention(8, 2).rope_base) == (0, 10000.0)
