"""The drafters' training: what is measured of a drafter against single branches, and that a few steps teach it."""

from __future__ import annotations

import pytest
import torch

from mlreviews.decoding import EagleDraft, MedusaHeads
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.drafters import (
    DrafterRecipe,
    eagle_accuracies,
    medusa_accuracies,
    new_drafter,
    train_drafter,
)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _teacher() -> TinyLM:
    config = TinyLMConfig(vocab_size=7, d_model=12, layers=1, heads=2, kv_heads=1, hidden=16)
    return TinyLM(config, generator=_rng()).eval().requires_grad_(False)


@torch.no_grad()
def test_accuracies_are_those_of_branches_run_one_by_one() -> None:
    teacher, time, start, depth = _teacher(), 9, 3, 3
    ids = torch.randint(7, (2, time), generator=_rng(1))
    features = teacher(ids, hidden_states=True).hidden_states[-1]  # type: ignore[index]
    draft = EagleDraft(12, 2, kv_heads=1, hidden=10, generator=_rng(2))
    heads = MedusaHeads(12, 7, 3, generator=_rng(3))
    found = eagle_accuracies(draft, teacher, ids, features, start=start, depth=depth, ranks=2)
    by_heads = medusa_accuracies(heads, ids, features, start=start, ranks=2)
    for k in range(depth):
        right: list[list[bool]] = []
        of_head: list[list[bool]] = []
        for row in range(2):
            for j in range(start, time - k - 2):
                f = features[row : row + 1, : j + 1]
                for i in range(k + 1):
                    predicted, _ = draft(f, teacher.embed_tokens(ids[row : row + 1, 1 : j + i + 2]))
                    f = torch.cat([f, predicted[:, -1:]], 1)
                best = teacher.lm_head(f[0, -1]).topk(2).indices
                right.append((best == ids[row, j + k + 2]).tolist())
                of_head.append((heads(features[row, j])[k].topk(2).indices == ids[row, j + k + 2]).tolist())
        torch.testing.assert_close(found[k], torch.tensor(right).double().mean(0))
        torch.testing.assert_close(by_heads[k], torch.tensor(of_head).double().mean(0))


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_training_lowers_the_loss_and_leaves_the_target_alone(kind: str) -> None:
    teacher, recipe = _teacher(), DrafterRecipe(windows=8, batch=4, epochs=20, heads=2, warm_up=2)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    ids = torch.arange(4 * 21).reshape(4, 21) % 7
    hidden = teacher(ids, hidden_states=True).hidden_states[-1]  # type: ignore[index]
    losses = [
        loss for _, loss in train_drafter(new_drafter(kind, teacher, recipe), teacher, recipe, [(ids, hidden)] * 2)
    ]
    assert len(losses) == recipe.steps == 40
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())
