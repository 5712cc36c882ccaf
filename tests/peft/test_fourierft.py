from __future__ import annotations

import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlreviews.peft import (
    FourierFTLinear,
    adapters,
    fourier_delta_weight,
    fourier_product,
    fourierft,
    gaussian_bandpass_entries,
    inject,
    load_adapter,
    save_adapter,
    spectral_is_cheaper,
    trainable_parameters,
    uniform_entries,
)
from tests.contracts.families import Sample
from tests.peft.models import tiny_gpt2, tiny_llama


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=_rng(seed), dtype=dtype)


def _linear(columns: int = 6, rows: int = 9) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(columns, rows)


def _layer(n: int = 7, columns: int = 6, rows: int = 9, **options: Any) -> FourierFTLinear:
    return FourierFTLinear(_linear(columns, rows), n, generator=_rng(), **options)


CONTRACT = {
    "FourierFTLinear": lambda: Sample(_layer(), (_random(2, 3, 6).float(),)),
    "FourierFTLinear, dense": lambda: Sample(_layer(50), (_random(20, 6).float(),)),
    "gaussian_bandpass_entries": lambda: Sample(gaussian_bandpass_entries, (20, 30, 8, 5.0, 3.0)),
}

SHAPES = [(9, 6), (4, 7), (6, 6), (1, 4), (2, 1)]
each_shape = pytest.mark.parametrize(("rows", "columns"), SHAPES)


def _by_cosines(c: Tensor, entries: Tensor, rows: int, columns: int, scaling: float) -> Tensor:
    j, k = torch.arange(rows, dtype=c.dtype)[:, None], torch.arange(columns, dtype=c.dtype)
    total = torch.zeros(rows, columns, dtype=c.dtype)
    for value, u, v in zip(c, *entries, strict=True):
        total += value * torch.cos(2 * math.pi * (u * j / rows + v * k / columns))
    return scaling / (rows * columns) * total


@each_shape
def test_the_matrix_is_the_sum_of_cosines_and_the_real_part_of_the_inverse_transform(rows: int, columns: int) -> None:
    for n in {1, rows * columns // 2 + 1, rows * columns}:
        c, entries = _random(n), uniform_entries(rows, columns, n)
        found = fourier_delta_weight(c, entries, rows, columns, 11.0)
        torch.testing.assert_close(found, _by_cosines(c, entries, rows, columns, 11.0))
        dense = torch.zeros(rows, columns, dtype=c.dtype).index_put(tuple(entries), c)
        torch.testing.assert_close(found, torch.fft.ifft2(dense).real * 11.0)


@each_shape
def test_the_product_without_the_matrix_is_that_with_it(rows: int, columns: int) -> None:
    for n in {1, rows * columns // 2 + 1, rows * columns}:
        c, entries, x = _random(n), uniform_entries(rows, columns, n), _random(3, 2, columns, seed=1)
        matrix = _by_cosines(c, entries, rows, columns, 11.0)
        torch.testing.assert_close(fourier_product(x, c, entries, rows, 11.0), x @ matrix.mT)
        strided = _random(columns, 3, seed=2).mT
        torch.testing.assert_close(fourier_product(strided, c, entries, rows, 11.0), strided @ matrix.mT)


@each_shape
def test_gradients_of_first_and_second_order(rows: int, columns: int) -> None:
    n = rows * columns // 2 + 1
    entries = uniform_entries(rows, columns, n)
    x, c = _random(2, columns).requires_grad_(), _random(n, seed=1).requires_grad_()
    call = lambda x, c: fourier_product(x, c, entries, rows, 11.0)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, c))
    assert torch.autograd.gradgradcheck(call, (x, c), fast_mode=True)
    assert torch.autograd.gradcheck(lambda c: call(x.detach(), c), (c,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: call(x, c.detach()), (x,), fast_mode=True)


def test_many_coefficients_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    n, entries = 50, uniform_entries(9, 6, 50)
    whole, blocks = [], []
    for size, found in ((1024, whole), (7, blocks)):
        monkeypatch.setattr(fourierft, "_BLOCK", size)
        x, c = _random(4, 6).requires_grad_(), _random(n).requires_grad_()
        y = fourier_product(x, c, entries, 9)
        found += [y.detach(), *torch.autograd.grad(y, (x, c), _random(4, 9, seed=3))]
    torch.testing.assert_close(whole, blocks)


def test_the_matrix_of_2048_by_2048_is_right_too() -> None:
    """MKL's complex transform in two dimensions is wrong at just this size with several threads (pytorch #169670)."""
    places = torch.randint(2048, (2, 50), generator=torch.Generator().manual_seed(0))
    coefficients = torch.randn(50, generator=torch.Generator().manual_seed(1))
    found = fourier_delta_weight(coefficients, places, 2048, 2048, 1.0)
    x = torch.zeros(1, 2048)
    x[0, 7] = 1.0
    torch.testing.assert_close(found[:, 7], fourier_product(x, coefficients, places, 2048, 1.0)[0], rtol=0, atol=1e-9)


def test_one_coefficient_at_frequency_0_is_a_constant() -> None:
    found = fourier_delta_weight(torch.tensor([3.0]), torch.tensor([[0], [0]]), 4, 5, 10.0)
    torch.testing.assert_close(found, torch.full((4, 5), 3 * 10 / 20))


def test_all_frequencies_are_exactly_the_matrices_that_mirroring_leaves_alone() -> None:
    rows, columns = 5, 4
    entries = uniform_entries(rows, columns, rows * columns)
    unit = torch.eye(rows * columns, dtype=torch.float64)
    span = torch.stack([fourier_delta_weight(c, entries, rows, columns, 1.0).flatten() for c in unit])
    mirrored = torch.stack([m.view(rows, columns).roll((-1, -1), (0, 1)).flip(0, 1).flatten() for m in unit])
    torch.testing.assert_close(span @ mirrored, span)
    # an orbit of two entries, or one of its own, for each dimension
    orbits = int(torch.trace(mirrored)) + (rows * columns - int(torch.trace(mirrored))) // 2
    assert torch.linalg.matrix_rank(span) == orbits


def test_reduces_to_torch_nn_linear_with_coefficients_of_0() -> None:
    layer, x = _layer(zero=True), _random(4, 6).float()
    assert torch.equal(layer(x), layer.base(x))
    assert not layer.delta_weight().any()


def test_the_layer_computes_the_same_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = _random(3, 4, 6), []
    for spectral in (True, False):
        monkeypatch.setattr(fourierft, "spectral_is_cheaper", lambda *sizes, answer=spectral: answer)
        layer = _layer().double()
        layer(x).square().sum().backward()
        found.append((layer(x).detach(), layer.spectrum.grad))
    torch.testing.assert_close(found[0], found[1])
    expected = layer.base(x) + x @ _by_cosines(layer.spectrum.detach(), layer.entries, 9, 6, 150.0).mT
    torch.testing.assert_close(found[0][0], expected.detach())


def test_the_cheaper_form_is_chosen() -> None:
    assert spectral_is_cheaper(512, 2048, 2048, 1000)
    assert spectral_is_cheaper(512, 512, 512, 1000)
    assert not spectral_is_cheaper(512, 512, 512, 10000)
    assert not spectral_is_cheaper(10**5, 256, 256, 1000)
    assert spectral_is_cheaper(1, 256, 256, 1000)
    # where both cost the same: tokens (7 * 2 * 16 * 4 + 170 n) = tokens 256 + 20 * 256 * 8 for 64 tokens and n = 0
    assert [spectral_is_cheaper(tokens, 16, 16, 0) for tokens in (63, 64, 65)] == [True, False, False]


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def test_no_tensor_is_as_large_as_the_matrix_forward_and_backward() -> None:
    d = 64
    entries, x, c = uniform_entries(d, d, 40), _random(3, d).requires_grad_(), _random(40).requires_grad_()
    with Largest() as largest:
        fourier_product(x, c, entries, d).sum().backward()
    assert largest.entries == 3 * 2 * (d // 2 + 1)  # a half spectrum of the inputs as real numbers
    with Largest() as largest:
        fourier_delta_weight(c, entries, d, d)
    assert largest.entries == d * d


def test_places_are_different_and_the_same_for_all_layers_of_a_shape() -> None:
    layers = [_layer(20), _layer(20), _layer(20, seed=778)]
    assert torch.equal(layers[0].entries, layers[1].entries)
    assert not torch.equal(layers[0].entries, layers[2].entries)
    for entries in (layers[0].entries, gaussian_bandpass_entries(9, 6, 20, 2.0, 9.0, generator=_rng())):
        assert entries.shape == (2, 20)
        assert len({(int(u), int(v)) for u, v in entries.T}) == 20
        assert bool(((entries >= 0) & (entries < torch.tensor([[9], [6]]))).all())
    assert sum(p.numel() for p in trainable_parameters(layers[0]).values()) == 20


@pytest.mark.parametrize("f_c", [0.0, 3.0])
def test_places_have_the_probabilities_of_the_band_pass(f_c: float) -> None:
    rows, columns, draws = 6, 5, 1000
    probability = torch.empty(rows, columns, dtype=torch.float64)
    for u in range(rows):
        for v in range(columns):
            d = math.hypot(min(u, rows - u), min(v, columns - v))
            exponent = (d**2 - f_c**2) / (d * 1.5) if d else (0 if f_c == 0 else math.inf)
            probability[u, v] = math.exp(-(exponent**2))
    probability /= probability.sum()
    counts, generator = torch.zeros(rows, columns, dtype=torch.float64), _rng()
    for _ in range(draws):
        u, v = gaussian_bandpass_entries(rows, columns, 1, f_c, 1.5, generator=generator)
        counts[u, v] += 1
    deviation = (probability * (1 - probability) / draws).sqrt()
    assert bool(((counts / draws - probability).abs() <= 4.5 * deviation + 1e-12).all())


def test_a_narrow_band_holds_the_places_at_its_distance_alone() -> None:
    """The sums of two squares that are 25 come first: 0 and 5, 3 and 4, with either sign and in either order."""
    u, v = gaussian_bandpass_entries(20, 31, 12, 5.0, 0.05, generator=_rng())
    found = {(int(a) - 20 * int(a > 10), int(b) - 31 * int(b > 15)) for a, b in zip(u, v, strict=True)}
    assert found == {(a, b) for a in range(-5, 6) for b in range(-5, 6) if a * a + b * b == 25}


def test_a_layer_with_a_favoured_frequency() -> None:
    near, far = (_layer(10, 40, 40, f_c=f_c, bandwidth=2.0).entries for f_c in (1.0, 18.0))
    distance = [torch.minimum(e, 40 - e).double().square().sum(0).sqrt() for e in (near, far)]
    assert distance[0].max() < distance[1].min()
    assert torch.equal(near, _layer(10, 40, 40, f_c=1.0, bandwidth=2.0).entries)


def test_coefficients_are_normal_and_in_single_precision() -> None:
    layer = FourierFTLinear(_linear(60, 50).bfloat16(), 3000, generator=_rng())
    assert layer.spectrum.dtype == torch.float32
    assert abs(layer.spectrum.mean()) < 5 / 3000**0.5
    assert abs(layer.spectrum.var() - 1) < 5 * (2 / 3000) ** 0.5
    assert layer(_random(2, 60).bfloat16()).dtype == torch.bfloat16


def test_defaults() -> None:
    def of(call: Any, *names: str) -> list[Any]:
        return [inspect.signature(call).parameters[name].default for name in names]

    assert of(FourierFTLinear, "n_frequency", "scaling", "seed", "bandwidth") == [1000, 150.0, 777, 200.0]
    assert of(uniform_entries, "seed") + of(gaussian_bandpass_entries, "bandwidth") == [777, 200.0]
    assert of(fourier_delta_weight, "scaling") == of(fourier_product, "scaling") == [150.0]


IDS = torch.arange(24).view(2, 12)
each_model = pytest.mark.parametrize(
    ("make", "target"), [(tiny_llama, r".*\.(q|down)_proj"), (tiny_gpt2, r".*\.c_attn")], ids=["Llama", "GPT-2"]
)


@each_model
def test_what_is_saved_here_means_the_same_to_peft(make: Any, target: str, tmp_path: Path) -> None:
    import peft

    model = make()
    count = {"0": 30, "1": 20}
    inject(model, target, lambda path, base: FourierFTLinear(base, count[path.split(".")[2]], 40.0, seed=5))
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make()(IDS).logits, model(IDS).logits, atol=1e-3)


@each_model
def test_what_peft_saves_means_the_same_here(make: Any, target: str, tmp_path: Path) -> None:
    import peft

    config = peft.FourierFTConfig(
        n_frequency=30, scaling=40.0, random_loc_seed=3, target_modules=target, n_frequency_pattern={"1.*": 20},
        fan_in_fan_out=make is tiny_gpt2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), config).eval()
        theirs.save_pretrained(tmp_path)
    model = make()
    assert load_adapter(model, tmp_path) == list(adapters(model))
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": _linear()})
    inject(model, "q", lambda path, base: FourierFTLinear(base, 5))
    save_adapter(model, tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, state = json.loads(config.read_text()), load_file(tensors)
    fresh = nn.ModuleDict({"q": _linear()})
    with pytest.raises(ValueError, match="name"):
        load_adapter(fresh, tmp_path, name="other")
    for change, extra in (
        ({"n_frequency": 6}, {}),
        ({}, {"base_model.model.k.fourierft_spectrum": torch.ones(5)}),
        ({}, {"base_model.model.q.lora_A": torch.ones(5)}),
    ):
        config.write_text(json.dumps(good | change))
        save_file(state | extra, tensors)
        with pytest.raises(ValueError, match="fits neither"):
            load_adapter(fresh, tmp_path)
        assert adapters(fresh) == {}


def test_what_the_files_cannot_say_is_not_saved(tmp_path: Path) -> None:
    def saved(first: dict[str, Any], second: dict[str, Any], name: str = "default") -> None:
        model = nn.ModuleDict({"a": nn.ModuleDict({"q": _linear()}), "q": _linear()})
        for path, options in ((r"a\.q", first), ("q", second)):
            inject(model, path, lambda path, base, o=options: FourierFTLinear(base, **{"n_frequency": 5, **o}))
        save_adapter(model, tmp_path, name=name)

    with pytest.raises(ValueError, match="same scaling and seed"):
        saved({}, {"seed": 3})
    with pytest.raises(ValueError, match="same scaling and seed"):
        saved({}, {"scaling": 3.0})
    with pytest.raises(ValueError, match="name"):
        saved({}, {}, name="other")
    with pytest.raises(ValueError, match="favoured"):
        saved({"f_c": 1.0}, {"f_c": 1.0})
    with pytest.raises(ValueError, match="end alike"):
        saved({}, {"n_frequency": 6})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named() -> None:
    for name, call in {
        "n: ": lambda: uniform_entries(3, 4, 13),
        "out_features": lambda: uniform_entries(0, 4, 1),
        "in_features": lambda: uniform_entries(3, 0, 1),
        "n: expected at least 1": lambda: _layer(0),
        "f_c": lambda: gaussian_bandpass_entries(3, 4, 2, -1.0),
        "bandwidth": lambda: gaussian_bandpass_entries(3, 4, 2, 1.0, 0.0),
        "widen": lambda: gaussian_bandpass_entries(30, 40, 1000, 1.0, 0.1),
        "scaling": lambda: _layer(scaling=math.inf),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(TypeError, match="linear layer"):
        FourierFTLinear(nn.LayerNorm(3))
