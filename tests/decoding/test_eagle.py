"""EAGLE: exact laws of trees by enumeration, greedy text as plain decoding has it, drafts against single branches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from mlreviews.decoding import EagleDraft, draw_children, eagle, eagle_generate, eagle_loss, verify_tree
from mlreviews.decoding.eagle import EAGLE_TREE, EagleDrafter
from mlreviews.decoding.trees import RankTree
from mlreviews.models import Sampler, TinyLM, TinyLMConfig, draw, generate
from tests.contracts.families import Sample
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain

VOCAB, WIDTH = 7, 12


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(seed: int = 0, **sizes: Any) -> TinyLM:
    """Float64 and with logits far apart, so that no two are equal up to rounding."""
    config = TinyLMConfig(
        **{"vocab_size": VOCAB, "d_model": WIDTH, "layers": 2, "heads": 2, "hidden": 16, "tied": False} | sizes
    )
    model = TinyLM(config, generator=_rng(seed)).double().eval().requires_grad_(False)
    model.lm_head.weight.mul_(4)
    return model


def _draft(seed: int = 0, width: int = WIDTH) -> EagleDraft:
    return EagleDraft(width, 2, kv_heads=1, hidden=10, generator=_rng(seed)).double().requires_grad_(False)


def _prompt(batch: int = 2, time: int = 6) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=_rng(5))


CONTRACT = {
    "EagleDraft": lambda: Sample(
        EagleDraft(8, 2, kv_heads=1, hidden=6, generator=_rng()),
        (torch.randn(2, 5, 8, generator=_rng(1)), torch.randn(2, 5, 8, generator=_rng(2))),
    ),
    "draw_children": lambda: Sample(draw_children, (torch.full((3, 9), 1 / 9), 4)),
    "verify_tree": lambda: Sample(
        verify_tree, (torch.full((4, 29), 1 / 29), torch.full((4, 29), 1 / 29), [5, 1, 2, 3], [-1, 0, 0, 1])
    ),
    "eagle_generate": lambda: Sample(
        eagle_generate, (_model(), _draft(), _prompt(), 6), {"sampler": Sampler(temperature=1.0)}
    ),
}


@pytest.fixture
def sequential(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Children drawn one after another, which can be enumerated."""
    monkeypatch.setattr(eagle, "draw_children", _one_by_one)
    return


def _one_by_one(q: Tensor, width: int, generator: torch.Generator | None = None) -> Tensor:
    found: list[Tensor] = []
    left = q.clone()
    for _ in range(width):
        # where no token is left, any will do, so one that was drawn before
        found.append(draw(torch.where(left.sum(-1, keepdim=True) > 0, left, q), generator))
        left = left.scatter(-1, found[-1][..., None], 0.0)
    return torch.stack(found, -1)


def _laws(rows: int, vocab: int, seed: int) -> Tensor:
    p = torch.rand(rows, vocab, generator=_rng(seed), dtype=torch.float64) ** 2
    return p / p.sum(1, keepdim=True)


def test_children_are_drawn_without_replacement() -> None:
    q, count = torch.tensor([0.1, 0.0, 0.5, 0.4]), 20_000
    found = draw_children(q.expand(count, 4), 2, _rng())
    for a in range(4):
        for b in range(4):
            expected = float(q[a] * q[b] / (1 - q[a])) if a != b else 0.0
            seen = float(((found[:, 0] == a) & (found[:, 1] == b)).double().mean())
            assert abs(seen - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / count)
    assert draw_children(q, 4, _rng())[-1] == 1


def test_recursive_rejection_leaves_the_targets_law_for_any_number_of_children() -> None:
    p, q = _laws(1, 3, 0), _laws(1, 3, 1)
    for k in range(4):

        def run(k: int = k) -> list[int]:
            children = _one_by_one(q, k)[0].tolist() if k else []
            path, token = verify_tree(p.expand(k + 1, -1), q.expand(k + 1, -1), [0, *children], [-1] + [0] * k)
            return [children[path[1] - 1] if len(path) > 1 else token]

        assert_same_law(exact_law(run), {(x,): float(p[0, x]) for x in range(3)})


def test_trees_leave_the_targets_law_and_their_inputs_alone() -> None:
    # the children 1 and 2 of the root have one child each; p and q hang on the branch, as those of a model do
    branches = [(), *itertools.product(range(3), repeat=1), *itertools.product(range(3), repeat=2)]
    p_of, q_of = (dict(zip(branches, _laws(13, 3, seed), strict=True)) for seed in (2, 3))
    for a in range(3):
        q_of[a,] = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64)

    def run() -> list[int]:
        a, b = _one_by_one(q_of[()], 2).tolist()
        c, d = (int(draw(q_of[x,])) for x in (a, b))
        nodes = [(), (a,), (b,), (a, c), (b, d)]
        p, q = (torch.stack([law[node] for node in nodes]) for law in (p_of, q_of))
        before, tokens = (p.clone(), q.clone()), [0, a, b, c, d]
        path, token = verify_tree(p, q, tokens, [-1, 0, 0, 1, 2])
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])
        text = [*(tokens[node] for node in path[1:]), token]
        return (text if len(text) > 1 else [*text, int(draw(p_of[tuple(text)]))])[:2]

    expected = {(a, b): float(p_of[()][a] * p_of[a,][b]) for a in range(3) for b in range(3)}
    assert_same_law(exact_law(run), expected)


def test_the_same_distribution_is_never_rejected() -> None:
    p = _laws(5, 4, 4)
    tokens, parents = [0, 3, 1, 2, 2], [-1, 0, 1, 2, 3]
    law = exact_law(lambda: verify_tree(p, p, tokens, parents)[0])
    assert law == {(0, 1, 2, 3, 4): pytest.approx(1.0)}


def test_point_masses_accept_with_the_targets_probability() -> None:
    p, q = _laws(2, 4, 5), torch.eye(4, dtype=torch.float64)[[2, 0]]
    law = exact_law(lambda: verify_tree(p, q, [0, 2], [-1, 0])[0])
    assert law[0, 1] == pytest.approx(float(p[0, 2]))


def test_tokens_that_q_had_left_none_of_are_not_accepted() -> None:
    p, q = _laws(1, 4, 6).expand(3, -1), torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64).expand(3, -1)
    law = exact_law(lambda: verify_tree(p, q, [0, 1, 3], [-1, 0, 0])[0])
    assert set(law) == {(0, 1), (0,)}


SAMPLERS = [Sampler(1.3, top_k=2), Sampler(0.8, top_p=0.7), Sampler(1.0, top_k=2, repetition_penalty=1.4)]


@pytest.mark.usefixtures("sequential")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["top_k", "top_p", "penalty"])
def test_sampled_text_has_the_targets_law(sampler: Sampler) -> None:
    model, ids, tree = TableLM.random(4, 0), torch.tensor([[1, 3]]), RankTree([(0,), (1,)])
    draft = EagleDraft(4, 1, hidden=5, generator=_rng(1)).requires_grad_(False)
    found = exact_law(lambda: eagle_generate(model, draft, ids, 3, tree=tree, sampler=sampler).tokens)
    assert_same_law(found, law_of_penalised(model, ids, 3, sampler))


def law_of_penalised(model: TableLM, ids: Tensor, new: int, sampler: Sampler) -> dict[tuple[Any, ...], float]:
    """`law_of_chain`, with the repetition penalty."""
    if sampler.repetition_penalty == 1.0:
        return law_of_chain(model, ids, new, sampler)
    law: dict[tuple[Any, ...], float] = {}

    def follow(tokens: tuple[int, ...], weight: float) -> None:
        if len(tokens) == new:
            law[(tokens,)] = weight
            return
        whole = torch.cat([ids, torch.tensor([tokens], dtype=torch.int64)], 1)
        for token, p in enumerate(sampler.probabilities(model(whole).logits[:, -1], whole)[0].tolist()):
            if p > 0:
                follow((*tokens, token), weight * p)

    follow((), 1.0)
    return law


@pytest.mark.usefixtures("sequential")
def test_rows_of_a_batch_have_their_own_laws() -> None:
    # after 0 come 0 and 1 at random, after 1 comes 0, after 2 comes 3, and after 3 comes 2
    model, ids = TableLM.random(4, 0), torch.tensor([[0, 1], [2, 3]])
    model.table[:, :2, 2:] = -40
    model.table[:, 2:] = -40
    model.table[:, 1, 1] = -40
    model.table[:, 2, 3] = model.table[:, 3, 2] = 0
    draft, sampler, tree = (
        EagleDraft(4, 1, hidden=5, generator=_rng(1)).requires_grad_(False),
        Sampler(1.2),
        RankTree.chain(2),
    )
    draft.down_proj.weight.zero_()
    draft.o_proj.weight.zero_()
    # features are the logits: the guess is that the last logits but one come again
    draft.fc.weight.copy_(torch.eye(8)[[4, 5, 6, 7]])
    found = exact_law(lambda: eagle_generate(model, draft, ids, 4, tree=tree, sampler=sampler).tokens)
    (row,) = (tokens for tokens, weight in law_of_chain(model, ids[1:], 4, sampler).items() if weight > 0.5)
    expected = {(*tokens, *row): weight for tokens, weight in law_of_chain(model, ids[:1], 4, sampler).items()}
    assert_same_law(found, expected)


def test_reduces_to_speculative_decoding() -> None:
    from mlreviews.decoding import speculative_verify

    p, q, tokens = _laws(4, 3, 7), _laws(3, 3, 8), [2, 0, 1]
    padded = torch.cat([q, q[:1]])

    def tree() -> list[int]:
        path, token = verify_tree(p, padded, [0, *tokens], [-1, 0, 1, 2])
        return [len(path) - 1, token]

    def chain() -> list[int]:
        accepted, token = speculative_verify(p, q, torch.tensor(tokens), None)
        return [int(accepted), int(token)]

    assert_same_law(exact_law(tree), exact_law(chain))


def test_rows_that_accept_different_numbers_stay_apart() -> None:
    model, ids, sampler = _model(), _prompt(3), Sampler(repetition_penalty=1.3)
    mask = torch.arange(6) >= torch.tensor([0, 4, 2])[:, None]
    expected = generate(model, ids, 11, mask=mask, sampler=sampler, stop_tokens=(3,))
    found = eagle_generate(model, _draft(), ids, 11, mask=mask, sampler=sampler, stop_tokens=(3,))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.accepted is not None
    assert found.drafted is not None
    assert found.accepted.shape == (found.target_calls - 1, 3)
    assert len({tuple(column) for column in found.accepted.T.tolist()}) == 3
    assert int(found.drafted.max()) == 25
    assert (found.accepted < 0).equal(found.drafted < 0)
    assert int(found.accepted.min()) == int(found.drafted.min()) == -1
    # every token but the first of a row is an accepted one or the one behind these, which a row's end may cut off
    steps = (found.accepted >= 0).sum(0)
    assert set((1 + steps + found.accepted.clamp(min=0).sum(0) - found.lengths).tolist()) <= {0, 1}


def test_the_last_tokens_stay_within_the_context() -> None:
    model = _model(context=16)
    ids = _prompt(2)
    assert torch.equal(eagle_generate(model, _draft(), ids, 10).tokens, generate(model, ids, 10).tokens)
    assert eagle_generate(model, _draft(), ids, 0).tokens.shape == (2, 0)
    assert eagle_generate(model, _draft(), ids, 1).target_calls == 1


def test_a_draft_is_what_each_branch_by_itself_gives() -> None:
    model, draft, ids = _model(), _draft(), _prompt(2, 7)
    following = torch.cat([ids[:, 1:], torch.tensor([[4], [2]])], 1)
    features = model(ids, hidden_states=True).hidden_states[-1]  # type: ignore[index]
    drafter = EagleDrafter(model, draft, EAGLE_TREE, Sampler(), None)
    drafter(features[:, :4], following[:, :4], None, torch.arange(4), 5)
    found = drafter(features[:, 4:], following[:, 4:], None, torch.arange(4, 7), 5)

    def guesses(branch: Tensor) -> Tensor:
        """All ranks after a branch [batch, drafted tokens], from scratch."""
        f, tokens = features, following
        for i in range(branch.shape[1] + 1):
            predicted, _ = draft(f, model.embed_tokens(tokens))
            f = torch.cat([features, predicted[:, features.shape[1] - 1 :]], 1)
            tokens = torch.cat([following, branch[:, : i + 1]], 1)
        return model.lm_head(predicted[:, -1]).argsort(-1, descending=True)

    for node, path in enumerate(EAGLE_TREE.choices, 1):
        above = found.tree.mask[node].clone()
        above[[0, node]] = False
        assert torch.equal(found.tokens[:, node], guesses(found.tokens[:, above])[:, path[-1]])
    assert found.tokens[:, 0].tolist() == [4, 2]


def test_the_layer_is_llamas_without_its_first_norm() -> None:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=0.03,
        attn_implementation="eager",
    )
    peer: Any = LlamaDecoderLayer(config, 0).double().eval()
    peer.input_layernorm = nn.Identity()
    draft = EagleDraft(24, 4, kv_heads=2, hidden=10, norm_eps=0.03, generator=_rng()).double()
    draft.post_attention_layernorm.weight.data.copy_(torch.rand(24, generator=_rng(3)))
    weights = draft.state_dict()
    parts = weights["qkv_proj.weight"].split([24, 12, 12])
    renamed = {f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    renamed["self_attn.o_proj.weight"] = weights["o_proj.weight"]
    renamed["mlp.gate_proj.weight"], renamed["mlp.up_proj.weight"] = weights["gate_up_proj.weight"].split(10)
    renamed |= {f"mlp.{name}": weights[name] for name in ("down_proj.weight",)}
    renamed["post_attention_layernorm.weight"] = weights["post_attention_layernorm.weight"]
    peer.load_state_dict(renamed)
    features, embeddings = (3 * torch.randn(2, 5, 24, generator=_rng(i), dtype=torch.float64) for i in (1, 2))
    positions = torch.tensor([[0, 1, 2, 3, 4], [40, 41, 45, 60, 90]])
    x = nn.functional.linear(torch.cat([embeddings, features], -1), draft.fc.weight, draft.fc.bias)
    ahead = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1)
    turns = LlamaRotaryEmbedding(config)(x, positions)
    expected = peer(x, attention_mask=ahead.expand(2, 1, 5, 5), position_embeddings=turns)
    found, _ = draft(features, embeddings, positions=positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # angles are in float32


def test_padding_is_not_seen() -> None:
    draft, model = _draft(), _model()
    features, ids = torch.randn(1, 5, WIDTH, generator=_rng(), dtype=torch.float64), _prompt(1, 5)
    expected, _ = draft(features, model.embed_tokens(ids))
    junk = torch.full((1, 2, WIDTH), 7.0, dtype=torch.float64)
    mask = torch.arange(7)[None] >= 2
    x, y = torch.cat([junk, features], 1), torch.cat([junk, model.embed_tokens(ids)], 1)
    found, cache = draft(x[:, :6], y[:, :6], mask=mask[:, :6])
    last, _ = draft(x[:, 6:], y[:, 6:], cache)
    torch.testing.assert_close(torch.cat([found[:, 2:], last], 1), expected)
    assert bool(found.isfinite().all())


def test_the_loss_is_huber_s_and_the_cross_entropy_with_the_targets_distribution() -> None:
    head = _model().lm_head
    features = torch.randn(2, 3, WIDTH, generator=_rng(), dtype=torch.float64, requires_grad=True)
    same = features.detach().clone()
    p = head(same).softmax(-1)
    expected = -float((p * p.log()).sum(-1).mean())
    assert float(eagle_loss(same, features, head)) == pytest.approx(0.1 * expected)
    assert float(eagle_loss(same + 3.0, features, head, 0.0)) == pytest.approx(2.5)  # |x| - 1/2
    assert float(eagle_loss(same + 0.5, features, head, 0.0)) == pytest.approx(0.125)  # x^2 / 2
    eagle_loss(same.requires_grad_(), features, head).backward()
    assert features.grad is None
    one_hot = _model().lm_head
    one_hot.weight.mul_(1000)
    wrong = float(-one_hot(-features.detach()).log_softmax(-1).gather(-1, one_hot(features).argmax(-1, True)).mean())
    assert float(eagle_loss(-features.detach(), features, one_hot, 1.0)) == pytest.approx(
        wrong + float(eagle_loss(-features.detach(), features, one_hot, 0.0)), rel=1e-3
    )


def test_defaults_are_those_of_the_authors_and_of_llama() -> None:
    assert len(EAGLE_TREE.choices) == 25
    assert EAGLE_TREE.height == 5
    assert EagleDraft(160, 5).config == {"d_model": 160, "heads": 5, "kv_heads": 5, "hidden": 432, "norm_eps": 1e-6}


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    for name, sizes in (("heads", (12, 4)), ("heads", (12, 0)), ("d_model", (0, 2))):
        with pytest.raises(ValueError, match=name):
            EagleDraft(*sizes)
    with pytest.raises(ValueError, match="kv_heads"):
        EagleDraft(12, 3, kv_heads=2)
    with pytest.raises(ValueError, match="hidden"):
        EagleDraft(12, 3, hidden=0)
    with pytest.raises(ValueError, match="draft: expected features of size 12"):
        eagle_generate(_model(), _draft(width=16), _prompt(), 3)
    with pytest.raises(ValueError, match="input_ids"):
        eagle_generate(_model(), _draft(), _prompt()[:, :0], 3)
    broken = _model()
    broken.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        eagle_generate(broken, _draft(), _prompt(), 3)
    late = _model()
    cache_safe = generate(late, _prompt(), 3).tokens
    assert torch.equal(eagle_generate(late, _draft(), _prompt(), 3).tokens, cache_safe)
