import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlreviews.ssm.mamba import MambaBlock
from mlreviews.ssm.ssamba import (
    SSAMBA,
    BiMambaBlock,
    BiMambaEncoder,
    cluster_mask,
    masked_patch_loss,
    to_patches,
)
from tests.contracts.families import Sample

BATCH, TIME, DIM, STATE = 2, 7, 6, 3


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _moved(module: Any) -> Any:
    """With every parameter moved away from where it begins, and steps large enough for the state to matter."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(module.named_parameters()):
            parameter.add_(0.3 * _random(*parameter.shape, seed=i, dtype=torch.float32))
            if name.endswith("dt_proj.bias"):
                parameter.fill_(-0.5)
    return module.double()


def _block(**options: Any) -> BiMambaBlock:
    return _moved(BiMambaBlock(DIM, STATE, generator=_rng(), **options))


def _model() -> SSAMBA:
    return _moved(SSAMBA(2, 3, 4, 5, DIM, 2, STATE, generator=_rng()))


def _mask(batch: int = BATCH, patches: int = 6, masked: int = 4) -> Tensor:
    order = torch.stack([torch.randperm(patches, generator=_rng(seed)) for seed in range(batch)])
    return order < masked


CONTRACT = {
    "BiMambaBlock": lambda: Sample(_block().float(), (_random(BATCH, TIME, DIM, dtype=torch.float32),)),
    "BiMambaEncoder": lambda: Sample(
        _moved(BiMambaEncoder(DIM, 2, STATE, generator=_rng())).float(), (_random(BATCH, TIME, DIM).float(),)
    ),
    "SSAMBA": lambda: Sample(_model().float(), (_random(BATCH, 8, 15).float(), _mask())),
    "cluster_mask": lambda: Sample(cluster_mask, (2, 8, 9, 30)),
}


def _as_mamba(block: BiMambaBlock, direction: str) -> MambaBlock:
    """One direction alone, without the half of (1)."""
    found = MambaBlock(DIM, STATE)
    parameters = dict(getattr(block, direction).named_parameters())
    found.load_state_dict(
        {"in_proj.weight": block.in_proj.weight, "out_proj.weight": block.out_proj.weight} | parameters
    )
    return found.double()


class TestBiMambaBlock:
    def test_is_the_mean_of_two_mambas_that_share_their_projections(self) -> None:
        block, x = _block(), _random(BATCH, TIME, DIM)
        there, _ = _as_mamba(block, "forwards")(x)
        back, _ = _as_mamba(block, "backwards")(x.flip(1))
        torch.testing.assert_close(block(x), (there + back.flip(1)) / 2)
        assert not torch.allclose(there, back.flip(1))

    def test_a_reversed_sequence_with_swapped_branches_gives_the_reversed_output(self) -> None:
        block, x = _block(), _random(BATCH, TIME, DIM)
        swapped = copy.deepcopy(block)
        swapped.forwards, swapped.backwards = swapped.backwards, swapped.forwards
        torch.testing.assert_close(swapped(x.flip(1)), block(x).flip(1))
        assert not torch.allclose(block(x.flip(1)), block(x).flip(1))

    def test_reduces_to_mamba_with_the_backward_branch_shut(self) -> None:
        block, x = _block(), _random(BATCH, TIME, DIM)
        expected, _ = _as_mamba(block, "forwards")(x)
        with torch.no_grad():
            block.out_proj.weight.mul_(2)
            block.backwards.D.zero_()
            block.backwards.x_proj.weight[-STATE:] = 0
        torch.testing.assert_close(block(x), expected)

    def test_every_output_sees_every_input(self) -> None:
        block, x = _block(), _random(1, TIME, DIM).requires_grad_()
        for t in range(TIME):
            (seen,) = torch.autograd.grad(block(x)[0, t].sum(), x)
            assert (seen[0].abs().amax(1) > 1e-9).all()

    def test_gradcheck(self) -> None:
        block, x = _block(), _random(1, 4, DIM).requires_grad_()
        names, values = zip(*block.named_parameters(), strict=True)

        def run(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)

    def test_begins_as_mamba_in_both_directions(self) -> None:
        before = torch.get_rng_state()
        block, same, other = (BiMambaBlock(40, 5, generator=_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, block.parameters(), same.parameters()))
        drawn = {n for (n, p), q in zip(block.named_parameters(), other.parameters(), strict=True) if (p != q).any()}
        assert not any(n.endswith(("A_log", ".D")) for n in drawn)
        assert len(drawn) == len(list(block.parameters())) - 4
        for direction in (block.forwards, block.backwards):
            torch.testing.assert_close(direction.A_log.exp(), torch.arange(1.0, 6).expand(80, 5))
            assert torch.equal(direction.D, torch.ones(80))
            assert direction.dt_proj.weight.shape == (80, 3)
            assert direction.x_proj.weight.shape == (3 + 5 + 5, 80)
            assert direction.conv1d.weight.shape == (80, 1, 4)
            steps = nn.functional.softplus(direction.dt_proj.bias)
            assert 0.00099 < steps.min() < steps.max() < 0.101
        assert block.in_proj.weight.shape == (160, 40)
        assert not torch.equal(block.forwards.conv1d.weight, block.backwards.conv1d.weight)
        assert (block.in_proj.bias, block.out_proj.bias, block.forwards.x_proj.bias) == (None, None, None)
        assert BiMambaBlock(17, d_conv=2, expand=3).forwards.conv1d.weight.shape == (51, 1, 2)
        assert BiMambaBlock(17).forwards.A_log.shape == (34, 16)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"x: expected \[batch, time, 6\] .* got shape \(2, 7, 5\)"):
            _block()(_random(BATCH, TIME, 5))
        for name in ("d_model", "d_state", "d_conv", "expand"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                BiMambaBlock(**({"d_model": 4} | {name: 0}))


class TestEncoder:
    def test_residual_blocks_and_a_norm(self) -> None:
        encoder, x = _moved(BiMambaEncoder(DIM, 3, STATE, generator=_rng())), _random(BATCH, TIME, DIM)
        h = x
        for block, norm in zip(encoder.blocks, encoder.norms, strict=True):
            normed = (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
            h = h + block(normed * norm.weight + norm.bias)
        torch.testing.assert_close(
            encoder(x), nn.functional.layer_norm(h, (DIM,), encoder.norm.weight, encoder.norm.bias)
        )
        assert len(encoder.blocks) == 3
        with pytest.raises(ValueError, match="depth: expected at least 1"):
            BiMambaEncoder(DIM, 0)


class TestPatches:
    def test_by_hand(self) -> None:
        image = torch.arange(2 * 5 * 7.0).reshape(2, 5, 7)
        patches = to_patches(image, 2, 3)
        assert patches.shape == (2, 4, 6)
        assert patches[0].tolist() == [
            [0, 1, 2, 7, 8, 9],
            [3, 4, 5, 10, 11, 12],
            [14, 15, 16, 21, 22, 23],
            [17, 18, 19, 24, 25, 26],
        ]
        assert torch.equal(patches[1], patches[0] + 35)
        assert to_patches(image, 5, 1).shape == (2, 7, 5)
        assert to_patches(image, 1, 7).shape == (2, 5, 7)

    def test_equals_unfold(self) -> None:
        image = _random(3, 12, 20).mT.contiguous().mT
        expected = nn.functional.unfold(image[:, None], (4, 5), stride=(4, 5)).mT
        torch.testing.assert_close(to_patches(image, 4, 5), expected)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"spectrogram: expected \[batch, frequency, time\], got shape \(4, 4\)"):
            to_patches(torch.ones(4, 4), 2, 2)
        for image in (torch.ones(2, 3, 9), torch.ones(2, 9, 4)):
            with pytest.raises(ValueError, match="spectrogram: expected at least one patch of 4 x 5"):
                to_patches(image, 4, 5)
        with pytest.raises(ValueError, match="spectrogram: expected"):
            to_patches(torch.ones(0, 4, 5), 4, 5)
        for name in ("height", "width"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
                to_patches(torch.ones(1, 4, 4), **({"height": 1, "width": 1} | {name: 0}))


class TestMask:
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 81), st.integers(0, 99))
    @settings(max_examples=30)
    def test_masks_exactly_as_many(self, rows: int, columns: int, masked: int, seed: int) -> None:
        masked = min(masked, rows * columns)
        mask = cluster_mask(3, rows, columns, masked, generator=_rng(seed))
        assert mask.shape == (3, rows * columns)
        assert mask.sum(1).tolist() == [masked] * 3

    def test_one_square_of_each_size_inside_the_border(self) -> None:
        # So few that the first square nearly always holds them all: they lie within 5 x 5, and sides 3, 4, 5 occur.
        sides = []
        for seed in range(200):
            mask = cluster_mask(1, 40, 50, 9, generator=_rng(seed)).reshape(40, 50)
            rows, columns = mask.nonzero().unbind(1)
            sides.append((int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1))
        inside = [s for s in sides if max(s) <= 5]
        assert len(inside) > 160
        assert (3, 3) in inside
        assert max(map(max, inside)) == 5
        assert sum(max(s) == 4 for s in inside) > 20

    def test_every_patch_is_masked_at_times_and_clusters_hang_together(self) -> None:
        masks = cluster_mask(600, 6, 8, 16, generator=_rng()).double()
        often = masks.mean(0).reshape(6, 8)
        assert often.min() > 0.02  # the corner is covered by one start only
        assert often[-1, -1] > 1.5 * often[0, 0]
        neighbours = (masks.reshape(-1, 6, 8)[:, :, 1:] * masks.reshape(-1, 6, 8)[:, :, :-1]).mean()
        assert neighbours > 2 * (16 / 48) ** 2

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="masked: expected at most the 6 patches there are, got 7"):
            cluster_mask(1, 2, 3, 7, generator=None)
        for name in ("batch", "rows", "columns", "masked"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                cluster_mask(**({"batch": 1, "rows": 2, "columns": 3, "masked": 1} | {name: 0}), generator=None)


class TestLoss:
    @pytest.mark.parametrize("lam", [0.0, 0.7])
    def test_one_spectrogram_after_another(self, lam: float) -> None:
        c, r, x = (_random(BATCH, 6, 5, seed=seed) for seed in range(3))
        mask = _mask()
        disc, gen = [], []
        for b in range(BATCH):
            chosen = mask[b].nonzero()[:, 0].tolist()
            for i in chosen:
                weights = [math.exp(np.dot(c[b, i].numpy(), x[b, j].numpy())) for j in chosen]
                disc.append(-math.log(weights[chosen.index(i)] / sum(weights)))
                gen.append(np.mean((r[b, i].numpy() - x[b, i].numpy()) ** 2))
        found = masked_patch_loss(c, r, x, mask, lam)
        assert found.disc.item() == pytest.approx(np.mean(disc))
        assert found.gen.item() == pytest.approx(np.mean(gen))
        assert found.total.item() == pytest.approx(np.mean(disc) + lam * np.mean(gen))

    def test_lam_zero_leaves_infonce_as_cross_entropy(self) -> None:
        c, x = _random(1, 6, 5), _random(1, 6, 5, seed=1)
        found = masked_patch_loss(c, 1e3 * c, x, torch.ones(1, 6, dtype=torch.bool), 0.0)
        expected = nn.functional.cross_entropy(c[0] @ x[0].T, torch.arange(6))
        torch.testing.assert_close(found.total, expected)
        assert torch.equal(found.total, found.disc)

    def test_default_lam_is_ten(self) -> None:
        c, r, x = (_random(1, 6, 5, seed=seed) for seed in range(3))
        found = masked_patch_loss(c, r, x, _mask(1))
        torch.testing.assert_close(found.total, found.disc + 10 * found.gen)

    @pytest.mark.parametrize("masked", [1, 3, 6])
    def test_equal_patches_cannot_be_told_apart(self, masked: int) -> None:
        x = _random(BATCH, 1, 5).expand(-1, 6, -1)
        found = masked_patch_loss(_random(BATCH, 6, 5, seed=1), x, x, _mask(masked=masked))
        assert found.disc.item() == pytest.approx(math.log(masked), abs=1e-12)
        assert found.gen == 0

    def test_disc_is_least_where_each_prediction_is_its_own_patch(self) -> None:
        x = nn.functional.normalize(_random(1, 6, 5), dim=2)
        mask, losses = torch.ones(1, 6, dtype=torch.bool), {}
        for shift in range(6):
            losses[shift] = masked_patch_loss(5 * x.roll(shift, 1), x, x, mask).disc.item()
        assert min(losses, key=losses.__getitem__) == 0
        aligned = [masked_patch_loss(scale * x, x, x, mask).disc.item() for scale in (0.0, 1.0, 5.0, 50.0, 5e3)]
        assert aligned[0] == pytest.approx(math.log(6))
        assert aligned == sorted(aligned, reverse=True)
        assert aligned[-1] == pytest.approx(0, abs=1e-9)

    def test_only_masked_places_count(self) -> None:
        c, r, x = (_random(BATCH, 6, 5, seed=seed).requires_grad_() for seed in range(3))
        mask = _mask()
        found = masked_patch_loss(c, r, x, mask)
        elsewhere = ~mask[..., None] * 100.0
        other = masked_patch_loss(c + elsewhere, r - elsewhere, x + 3 * elsewhere, mask)
        torch.testing.assert_close(tuple(other), tuple(found))
        for part, inputs in ((found.disc, c), (found.gen, r)):
            (grad,) = torch.autograd.grad(part, inputs, retain_graph=True)
            assert ((grad != 0).any(2) == mask).all()
        # The patches are targets: nothing flows into them, nor from one head's loss into the other.
        assert torch.autograd.grad(found.total, x, allow_unused=True, retain_graph=True) == (None,)
        assert torch.autograd.grad(found.disc, r, allow_unused=True, retain_graph=True) == (None,)

    def test_other_spectrograms_do_not_count(self) -> None:
        c, r, x = (_random(4, 6, 5, seed=seed) for seed in range(3))
        parts = [masked_patch_loss(c[b : b + 1], r[b : b + 1], x[b : b + 1], _mask(4)[b : b + 1]) for b in range(4)]
        torch.testing.assert_close(
            torch.stack(masked_patch_loss(c, r, x, _mask(4))), torch.tensor(parts).double().mean(0), check_dtype=False
        )

    def test_gradcheck(self) -> None:
        c, r = (_random(BATCH, 6, 3, seed=seed).requires_grad_() for seed in range(2))
        x = _random(BATCH, 6, 3, seed=2)
        assert torch.autograd.gradcheck(lambda c, r: tuple(masked_patch_loss(c, r, x, _mask())), (c, r))

    def test_large_numbers_and_half_precision(self) -> None:
        c, r, x = (_random(1, 6, 5, seed=seed) for seed in range(3))
        huge = (1e4 * c).requires_grad_()
        found = masked_patch_loss(huge, r, x, _mask(1))
        found.total.backward()
        assert found.total.isfinite()
        assert huge.grad.isfinite().all()
        half = masked_patch_loss(c.bfloat16(), r.bfloat16(), x.bfloat16(), _mask(1))
        exact = masked_patch_loss(c.bfloat16().double(), r.bfloat16().double(), x.bfloat16().double(), _mask(1))
        assert half.total.dtype == torch.float32
        torch.testing.assert_close(half.total.double(), exact.total, rtol=1e-5, atol=0)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, mask = _random(BATCH, 6, 5), _mask()
        with pytest.raises(ValueError, match=r"patches: expected \[batch, patches, pixels\] .* got shape \(6, 5\)"):
            masked_patch_loss(x, x, x[0], mask)
        with pytest.raises(ValueError, match="patches: expected"):
            masked_patch_loss(x[..., :0], x[..., :0], x[..., :0], mask)
        with pytest.raises(ValueError, match=r"cls_out: expected \[2, 6, 5\], as patches has, got shape \(2, 6, 4\)"):
            masked_patch_loss(x[..., :4], x, x, mask)
        with pytest.raises(ValueError, match="rec_out: expected"):
            masked_patch_loss(x, x[:1], x, mask)
        with pytest.raises(ValueError, match=r"mask: expected bool \[2, 6\], got torch.bool of shape \(2, 5\)"):
            masked_patch_loss(x, x, x, mask[:, :5])
        with pytest.raises(ValueError, match=r"mask: expected bool \[2, 6\], got torch.int64"):
            masked_patch_loss(x, x, x, mask.long())
        uneven = mask.clone()
        uneven[0] = True
        for wrong in (uneven, torch.zeros_like(mask)):
            with pytest.raises(ValueError, match="mask: expected the same number of masked patches in each row, not 0"):
                masked_patch_loss(x, x, x, wrong)
        with pytest.raises(ValueError, match="lam: expected at least 0"):
            masked_patch_loss(x, x, x, mask, -0.1)
        with pytest.raises(ValueError, match="lam: expected a finite number"):
            masked_patch_loss(x, x, x, mask, math.nan)


class TestSSAMBA:
    def test_masked_patches_are_not_seen(self) -> None:
        model, image, mask = _model(), _random(BATCH, 8, 15), _mask()
        noise = nn.functional.fold((mask[:, None] * _random(BATCH, 20, 6, seed=5)), (8, 15), (4, 5), stride=(4, 5))
        changed = image + noise[:, 0]
        assert ((model.patches(changed) != model.patches(image)).any(2) == mask).all()
        assert torch.equal(model.features(changed, mask), model.features(image, mask))
        assert not torch.allclose(model.features(changed), model.features(image))

    def test_tokens_positions_and_heads(self) -> None:
        model, image, mask = _model(), _random(BATCH, 8, 15), _mask()
        patches = to_patches(image, 4, 5)
        tokens = torch.empty(BATCH, 6, DIM).double()
        for b in range(BATCH):
            for i in range(6):
                token = model.mask_embed if mask[b, i] else model.proj.weight @ patches[b, i] + model.proj.bias
                tokens[b, i] = (token + model.positions[i]).detach()
        h = model.encoder(tokens)
        torch.testing.assert_close(model.features(image, mask), h)
        cls_out, rec_out = model(image, mask)
        torch.testing.assert_close(cls_out, model.cls_head(h))
        torch.testing.assert_close(rec_out, model.rec_head(h))
        assert cls_out.shape == rec_out.shape == patches.shape
        none = torch.zeros_like(mask)
        torch.testing.assert_close(model(image), model(image, none))

    def test_pretraining_loss(self) -> None:
        model, image, mask = _model(), _random(BATCH, 8, 15), _mask()
        cls_out, rec_out = model(image, mask)
        expected = masked_patch_loss(cls_out, rec_out, to_patches(image, 4, 5), mask, 3.0)
        assert torch.equal(model.pretraining_loss(image, mask, 3.0).total, expected.total)
        default = model.pretraining_loss(image, mask)
        torch.testing.assert_close(default.total, default.disc + 10 * default.gen)
        default.total.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())

    def test_begins_as_the_paper_says(self) -> None:
        before = torch.get_rng_state()
        model, same = (SSAMBA(d_model=32, depth=1, generator=_rng(1)) for _ in range(2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, model.parameters(), same.parameters()))
        assert model.positions.shape == (512, 32)
        assert model.positions.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.positions.mean().item() == pytest.approx(0, abs=4 * 0.02 / 128)
        assert model.proj.weight.shape == (32, 256)
        assert [type(m) for m in model.cls_head] == [type(m) for m in model.rec_head] == [nn.Linear, nn.ReLU, nn.Linear]
        assert not torch.equal(model.cls_head[0].weight, model.rec_head[0].weight)
        wide = SSAMBA(2, 2, 1, 1, d_model=400, depth=1, d_state=1, generator=_rng(2))
        assert wide.mask_embed.norm().item() == pytest.approx(1, abs=4 * math.sqrt(0.5 / 400))
        assert model.encoder.blocks[0].forwards.A_log.shape == (64, 16)

    def test_one_update_after_another_learns_a_spectrogram(self) -> None:
        model = SSAMBA(2, 3, 4, 5, 16, 1, 4, generator=_rng()).double()
        image, mask = _random(1, 8, 15), _mask(1)
        optimiser = torch.optim.AdamW(model.parameters(), 0.01)
        first = model.pretraining_loss(image, mask)
        for _ in range(40):
            optimiser.zero_grad()
            model.pretraining_loss(image, mask).total.backward()
            optimiser.step()
        last = model.pretraining_loss(image, mask)
        assert last.disc < 0.3 * first.disc
        assert last.gen < 0.3 * first.gen

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model, image = _model(), _random(BATCH, 8, 15)
        with pytest.raises(ValueError, match=r"spectrogram: expected \[batch, 8, 15\], got shape \(2, 8, 14\)"):
            model(image[..., :14])
        with pytest.raises(ValueError, match="spectrogram: expected"):
            model(image[0])
        with pytest.raises(ValueError, match=r"mask: expected bool \[2, 6\], got torch.bool of shape \(2, 5\)"):
            model(image, _mask()[:, :5])
        with pytest.raises(ValueError, match="mask: expected bool"):
            model(image, _mask().long())
        for name in ("rows", "columns", "height", "width", "d_model", "depth", "d_state"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                SSAMBA(**({"d_model": 4, "depth": 1} | {name: 0}))


def test_the_rank_of_delta_is_a_sixteenth_of_the_model_rounded_up() -> None:
    for d_model, rank in ((16, 1), (17, 2), (33, 3)):
        block = BiMambaBlock(d_model, generator=torch.Generator())
        assert {direction.dt_rank for direction in (block.forwards, block.backwards)} == {rank}
