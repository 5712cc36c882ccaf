import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from mlreviews.peft.neftune import NEFTune, neftune_noise
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


CONTRACT = {"neftune_noise": lambda: Sample(neftune_noise, (_random(2, 5, 3),))}


class TestNoise:
    @pytest.mark.parametrize("alpha", [1.0, 5.0, 12.0])
    def test_is_that_of_transformers(self, alpha: float) -> None:
        embedding, ids = nn.Embedding(11, 6), torch.arange(21).reshape(3, 7) % 11
        embedding.neftune_noise_alpha = alpha
        handle = embedding.register_forward_hook(neftune_post_forward_hook)
        torch.manual_seed(4)
        theirs = embedding(ids)
        handle.remove()
        torch.testing.assert_close(neftune_noise(embedding(ids), alpha, generator=_rng(4)), theirs)

    def test_law(self) -> None:
        batch, time, dim, alpha = 300, 7, 12, 9.0
        x = _random(batch, time, dim, dtype=torch.float64)
        noise = neftune_noise(x, alpha, generator=_rng(1)) - x
        bound = alpha / (time * dim) ** 0.5
        assert 0.999 * bound < noise.abs().max() <= bound * (1 + 1e-6)
        assert abs(noise.mean()) < 4 * bound / (3 * noise.numel()) ** 0.5
        # eq. (2); the variance of u^2 for u uniform in (-1, 1) is 1/5 - 1/9 = 4/45
        norms = noise.square().sum((1, 2))
        error = bound**2 * (time * dim * 4 / 45 / batch) ** 0.5
        assert abs(norms.mean() - alpha**2 / 3) < 4 * error

    def test_padding_gets_none_and_does_not_count(self) -> None:
        x = _random(4, 6, 5)
        mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [1] + [0] * 5, [0] * 6]).bool()
        noise = neftune_noise(x, 3.0, mask, generator=_rng(2)) - x
        assert (noise[~mask] == 0).all()
        # the draws are those without a mask, and a row of n tokens has the scale of a sequence of n
        drawn = neftune_noise(x, 3.0, generator=_rng(2)) - x
        for row, length in ((0, 6), (1, 4), (2, 1)):
            torch.testing.assert_close(noise[row][mask[row]], drawn[row][mask[row]] * (6 / length) ** 0.5)

    def test_reduces_to_plain_fine_tuning(self) -> None:
        x = _random(2, 4, 3)
        assert torch.equal(neftune_noise(x, 0.0), x)
        assert torch.equal(neftune_noise(x, generator=_rng()), neftune_noise(x, 5.0, generator=_rng()))
        assert NEFTune(nn.Embedding(3, 2)).alpha == 5
        assert NEFTune(nn.Embedding(3, 2), 0.0).alpha == 0

    def test_gradient_is_that_of_the_embeddings(self) -> None:
        x = _random(2, 4, 3).requires_grad_()
        weights = _random(2, 4, 3, seed=1)
        (neftune_noise(x, 5.0) * weights).sum().backward()
        assert torch.equal(x.grad, weights)

    def test_half_precision_sees_the_same_draws(self) -> None:
        x = torch.zeros(2, 4, 3)
        half = neftune_noise(x.bfloat16(), 5.0, generator=_rng())
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, neftune_noise(x, 5.0, generator=_rng()).bfloat16())

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = _random(2, 4, 3)
        with pytest.raises(ValueError, match="alpha: expected at least 0"):
            neftune_noise(x, -1.0)
        with pytest.raises(ValueError, match="alpha: expected a finite"):
            NEFTune(nn.Embedding(3, 2), float("nan"))
        with pytest.raises(ValueError, match=r"embeddings: expected \[batch, time, dim\]"):
            neftune_noise(x[0])
        with pytest.raises(ValueError, match=r"embeddings: .* no empty axis"):
            neftune_noise(x[:, :0])
        with pytest.raises(ValueError, match=r"mask: expected \[2, 4\] of bool, got shape \(2, 3\)"):
            neftune_noise(x, 1.0, torch.ones(2, 3).bool())
        with pytest.raises(ValueError, match=r"mask: .* of torch.float32"):
            neftune_noise(x, 1.0, torch.ones(2, 4))


class TestHook:
    def test_only_in_training_and_until_detached(self) -> None:
        model = nn.Sequential(nn.Embedding(11, 3), nn.Linear(3, 2))
        ids = torch.arange(10).reshape(2, 5)
        plain = model(ids)
        noise = NEFTune(model[0], 4.0, generator=_rng(3))
        expected = model[1](neftune_noise(model[0].weight[ids], 4.0, generator=_rng(3)))
        assert torch.equal(model(ids), expected)
        noise.attach()  # not twice
        assert not torch.equal(model(ids), plain)
        assert len(model[0]._forward_hooks) == 1
        assert torch.equal(model.eval()(ids), plain)
        noise.detach()
        noise.detach()
        assert not model[0]._forward_hooks
        assert torch.equal(model.train()(ids), plain)
        noise.attach()
        assert not torch.equal(model(ids), plain)

    def test_scale_depends_on_the_length(self) -> None:
        embedding = nn.Embedding(2, 4)
        NEFTune(embedding, 6.0, generator=_rng())
        for time in (5, 50):
            ids = torch.zeros(3, time, dtype=torch.int64)
            largest = (embedding(ids) - embedding.weight[0]).abs().max()
            assert 0.9 < largest / (6 / (4 * time) ** 0.5) <= 1.0001
