r"""FourierFT: a change of the weight made of a few frequencies, applied without ever forming it.

Paper: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (arXiv:2405.03003).

The change of a weight is treated as an image, of which n places in the spectrum are chosen once, at random and alike
for all layers of a shape; the coefficients there are all that is trained and stored. The paper transforms the spectrum
to a dense matrix at each step. Here the spectrum is applied where it is sparse, between two one-dimensional transforms
of the vectors.

Equation:
    $$ F_{u_l v_l} = c_l, \quad 0 \text{ elsewhere}; \qquad
       \Delta W = \alpha \operatorname{Re}\bigl(\operatorname{IDFT2}(F)\bigr), \qquad
       \Delta W_{jk} = \frac{\alpha}{d_1 d_2} \sum_l c_l \cos 2\pi\Bigl(\frac{u_l j}{d_1} + \frac{v_l k}{d_2}\Bigr)
       \tag{1} $$
    With the transform $\hat x_v = \sum_k x_k e^{-2\pi i v k / d_2}$ of an input, and $\hat x_v^*$ its conjugate,
    $$ (\Delta W x)_j = \frac{\alpha}{d_2} \operatorname{Re}\Bigl(\operatorname{IDFT}\Bigl(\sum_{l:\,u_l = u} c_l\,
       \hat x_{v_l}^*\Bigr)_j\Bigr) \tag{2} $$
    $$ \frac{\partial L}{\partial c_l} = \frac{\alpha}{d_1 d_2} \sum_\text{tokens}
       \operatorname{Re}(\hat g_{u_l} \hat x_{v_l}), \qquad g = \frac{\partial L}{\partial y} \tag{3} $$
    and $\Delta W^\top g$ is eq. (2) with rows and columns exchanged. Inputs and outputs are real, so half of each
    spectrum says all: a place and its mirror image (-u, -v) have the same cosine, and are folded onto the half
    spectrum's rows, where the sum is with conjugates or without them.
    $$ p(u, v) = \exp\Bigl(-\Bigl(\frac{D^2 - f_c^2}{D\,W}\Bigr)^2\Bigr) \tag{4} $$
    is the probability of a place with a favoured frequency.

Symbols:
    x: [*batch, in_features], the layer's input; y, g: [*batch, out_features], its output and the loss's gradient there.
    c: [n], the trained coefficients.
    u, v: [n], the places in the spectrum, of row and column.
    d_1, d_2: out_features, in_features.
    alpha: the scaling.
    D: distance of a place from frequency 0, in entries of the spectrum; f_c: the favoured distance; W: the bandwidth.

Defaults:
    n_frequency: 1000 (section 4.3).
    scaling: 150 (the peft library's; the paper tunes it, and takes 300 for Llama models).
    seed: 777 (the peft library's).
    bandwidth: 200 (figure 3).
    coefficients: normal with variance 1 (algorithm 1), so that a new adapter changes the layer's output a little.

Deviations:
    1. Eq. (2) and (3) instead of the dense matrix, where that is cheaper (`spectral_is_cheaper`); the numbers are the
       same up to rounding.
    2. The paper measures D from the centre of the matrix, where the transform that it uses has its highest
       frequencies. Here D is measured from frequency 0 around the edges, so that small f_c means low frequencies.

Reduces to:
    torch.nn.Linear: with coefficients of 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.adapter import PEFT_FORMATS, Adapter, PeftFormat, features, inject, is_transposed
from mlreviews.common.checks import check_count, check_number

__all__ = [
    "FourierFTLinear",
    "fourier_delta_weight",
    "fourier_product",
    "gaussian_bandpass_entries",
    "spectral_is_cheaper",
    "uniform_entries",
]

# columns of the spectrum that are gathered at once
_BLOCK = 1024


def uniform_entries(out_features: int, in_features: int, n: int, *, seed: int = 777) -> Int[Tensor, "2 n"]:
    """Places in the spectrum without a bias, the very ones of the peft library.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        n: how many.
        seed: of a generator of their own on the CPU.

    Raises:
        ValueError: there are not that many places.
    """
    _check_sizes(out_features, in_features, n)
    found = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([found // in_features, found % in_features])


def gaussian_bandpass_entries(
    out_features: int,
    in_features: int,
    n: int,
    f_c: float,
    bandwidth: float = 200.0,
    *,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "2 n"]:
    """Different places in the spectrum, drawn one after another with the probabilities of eq. (4).

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        n: how many.
        f_c: favoured distance from frequency 0.
        bandwidth: W.
        generator: draws them; None is the global one.

    Raises:
        ValueError: a size, distance or bandwidth out of range, or fewer places than n with a probability above 0.
    """
    _check_sizes(out_features, in_features, n)
    check_number("f_c", f_c, least=0.0)
    check_number("bandwidth", bandwidth, above=0.0)
    rows, columns = (torch.arange(d, dtype=torch.float64) for d in (out_features, in_features))
    squared = (
        torch.minimum(rows, out_features - rows)[:, None] ** 2 + torch.minimum(columns, in_features - columns) ** 2
    )
    distance = squared.sqrt().flatten()
    # at D = 0 the limit for f_c = 0, where eq. (4) is exp(-(D / W)^2)
    ratio = (distance - f_c**2 / distance if f_c > 0 else distance) / bandwidth
    log_p = -ratio.square()
    if int((log_p.exp() > 0).sum()) < n:
        raise ValueError(f"n: expected at most as many as have a probability, got {n}; widen the bandwidth")
    # The n largest of log p + Gumbel noise are a draw without replacement.
    noise = -torch.empty_like(log_p).exponential_(generator=generator).log()
    found = (log_p + noise).topk(n).indices
    return torch.stack([found // in_features, found % in_features])


def fourier_delta_weight(
    coefficients: Float[Tensor, " n"],
    entries: Int[Tensor, "2 n"],
    out_features: int,
    in_features: int,
    scaling: float = 150.0,
) -> Float[Tensor, "out_features in_features"]:
    """The dense matrix of eq. (1), from the half of the spectrum that the other half mirrors.

    Args:
        coefficients: [n], c.
        entries: [2, n], rows and columns of the places.
        out_features: d_1.
        in_features: d_2.
        scaling: alpha.
    """
    (u, v), half = entries, in_features // 2 + 1
    # each place and its mirror image, with half the coefficient
    rows = torch.cat([u, -u % out_features])
    columns = torch.cat([v, -v % in_features])
    values = torch.cat([coefficients, coefficients]) * (columns < half) / 2
    flat = torch.zeros(out_features * half, dtype=coefficients.dtype, device=coefficients.device)
    flat = flat.index_add(0, rows * half + columns.clamp(max=half - 1), values)
    spectrum = torch.complex(flat, torch.zeros_like(flat)).view(out_features, half)
    return torch.fft.irfft2(spectrum, s=(out_features, in_features)) * scaling


class _Folded(NamedTuple):
    """Places folded onto the half spectra of rows and columns; those that are summed without conjugates come first."""

    order: Tensor  # [n], from the order here to that of the coefficients
    rows: Tensor  # [n]
    columns: Tensor  # [n]
    plain: int  # how many come first

    @classmethod
    def of(cls, entries: Tensor, out_features: int, in_features: int) -> _Folded:
        u, v = entries
        fold_u, fold_v = u > out_features // 2, v > in_features // 2
        conjugate = fold_u == fold_v
        order = conjugate.to(torch.int8).argsort(stable=True)
        rows, columns = torch.where(fold_u, out_features - u, u), torch.where(fold_v, in_features - v, v)
        return cls(order, rows[order], columns[order], int((~conjugate).sum()))


def fourier_product(
    x: Float[Tensor, "*batch in_features"],
    coefficients: Float[Tensor, " n"],
    entries: Int[Tensor, "2 n"],
    out_features: int,
    scaling: float = 150.0,
) -> Float[Tensor, "*batch out_features"]:
    """The dense matrix times vectors, by eq. (2), with its gradients by eq. (3), and without the matrix.

    Args:
        x: [*batch, in_features], float32 or float64.
        coefficients: [n], c, of the same dtype.
        entries: [2, n], rows and columns of the places.
        out_features: d_1.
        scaling: alpha.
    """
    folded = _Folded.of(entries, out_features, x.shape[-1])
    return _product(x, coefficients, folded, out_features, scaling)


def _product(x: Tensor, coefficients: Tensor, folded: _Folded, out_features: int, scaling: float) -> Tensor:
    order, rows, columns, plain = folded
    vectors = x.reshape(-1, x.shape[-1])
    y: Tensor = _Product.apply(vectors, coefficients[order], rows, columns, plain, out_features, scaling / x.shape[-1])
    return y.view(*x.shape[:-1], out_features)


class _Product(torch.autograd.Function):
    """[tokens, in] to [tokens, out] by eq. (2); the coefficients are in the order of the folded places."""

    @staticmethod
    def forward(
        x: Tensor, c: Tensor, rows: Tensor, columns: Tensor, plain: int, out_features: int, scale: float
    ) -> Tensor:
        return _between_transforms(torch.fft.rfft(x), scale * c, columns, rows, plain, out_features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.plain, ctx.out_features, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, c, rows, columns = ctx.saved_tensors
        scale = ctx.scale / ctx.out_features
        transformed = torch.fft.rfft(g)
        grad_x = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_x = _between_transforms(transformed, scale * x.shape[1] * c, rows, columns, ctx.plain, x.shape[1])
        if ctx.needs_input_grad[1]:
            inputs, parts = torch.fft.rfft(x), []
            for block, conjugate in _blocks(len(c), ctx.plain):
                at_x, at_g = _at(inputs, columns[block]), _at(transformed, rows[block])
                parts.append(torch.linalg.vecdot(at_x.conj() if conjugate else at_x, at_g, dim=0).real)
            grad_c = torch.cat(parts) * scale
        return grad_x, grad_c, None, None, None, None, None


def _blocks(n: int, plain: int) -> Iterator[tuple[slice, bool]]:
    """The places in blocks, each with whether they are summed with conjugates."""
    for start, stop, conjugate in ((0, plain, False), (plain, n, True)):
        for i in range(start, stop, _BLOCK):
            yield slice(i, min(i + _BLOCK, stop)), conjugate


def _at(spectrum: Tensor, columns: Tensor) -> Tensor:
    # several times as quick as index_select on a CPU
    return spectrum.gather(1, columns.expand(spectrum.shape[0], -1))


def _between_transforms(
    spectrum: Tensor, c: Tensor, columns: Tensor, rows: Tensor, plain: int, out_features: int
) -> Tensor:
    """From the half spectrum of inputs [tokens, in / 2 + 1] to outputs [tokens, out]."""
    half = out_features // 2 + 1
    total = spectrum.new_zeros(spectrum.shape[0], half)
    # A place counts for itself and for its mirror image, which are one where a row is its own.
    weights = c * torch.where((rows == 0) | (2 * rows == out_features), 1.0, 0.5).to(c.dtype)
    for block, conjugate in _blocks(len(c), plain):
        part = _at(spectrum, columns[block]) * weights[block]
        total.index_add_(1, rows[block], part.conj().resolve_conj() if conjugate else part)
    # In a row that is its own mirror image the two cancel out what is imaginary.
    imaginary = torch.view_as_real(total)[..., 1]
    imaginary[:, 0] = 0
    if out_features % 2 == 0:
        imaginary[:, -1] = 0
    return torch.fft.irfft(total, n=out_features)


# Costs relative to a multiplication and addition in a matrix product, on the CPU of benchmarks/bench_peft.py: of an
# entry and a factor of 2 of its length in a transform of vectors and in that of the matrix, whose pages are new each
# time, and of a coefficient for a token.
_VECTOR_COST, _MATRIX_COST, _COEFFICIENT_COST = 7, 20, 170


def spectral_is_cheaper(tokens: int, out_features: int, in_features: int, n: int) -> bool:
    """Whether eq. (2) costs less than the dense matrix and its product with the tokens.

    The costs are tokens * (7 (d_1 log2 d_1 + d_2 log2 d_2) + 170 n) and tokens d_1 d_2 + 20 d_1 d_2 log2(d_1 d_2).

    Args:
        tokens: vectors.
        out_features: d_1.
        in_features: d_2.
        n: coefficients.
    """
    dense = out_features * in_features
    vector = out_features * math.log2(out_features) + in_features * math.log2(in_features)
    spectral_cost = tokens * (_VECTOR_COST * vector + _COEFFICIENT_COST * n)
    return spectral_cost < tokens * dense + _MATRIX_COST * dense * math.log2(dense)


class FourierFTLinear(Adapter):
    """A linear layer with coefficients of a few frequencies, of which a new one has drawn its own.

    Args:
        base: torch.nn.Linear, or what has its attributes, or transformers' Conv1D.
        n_frequency: n.
        scaling: alpha.
        seed: chooses the places; layers of a shape with the same seed have the same.
        f_c: favoured distance from frequency 0, None for places without a bias.
        bandwidth: W, where there is a favoured distance.
        zero: whether the coefficients begin at 0, so that a new adapter changes nothing.
        generator: draws the coefficients; None is the global one.

    Raises:
        TypeError: another kind of layer.
        ValueError: a number out of range, or more frequencies than places.
    """

    identity_at_start: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "FOURIERFT"

    entries: Tensor

    def __init__(
        self,
        base: nn.Module,
        n_frequency: int = 1000,
        scaling: float = 150.0,
        *,
        seed: int = 777,
        f_c: float | None = None,
        bandwidth: float = 200.0,
        zero: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        in_features, out_features = features(base)
        check_number("scaling", scaling)
        self.scaling, self.seed, self.f_c = scaling, seed, f_c
        if f_c is None:
            entries = uniform_entries(out_features, in_features, n_frequency, seed=seed)
        else:
            drawn = torch.Generator().manual_seed(seed)
            entries = gaussian_bandpass_entries(out_features, in_features, n_frequency, f_c, bandwidth, generator=drawn)
        weight = self.base.weight
        folded = _Folded.of(entries, out_features, in_features)
        self._plain = folded.plain
        # They follow from the seed.
        for name, index in {"entries": entries, **folded._asdict()}.items():
            if isinstance(index, Tensor):
                self.register_buffer(name, index.to(weight.device), persistent=False)
        spectrum = torch.zeros(
            n_frequency, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        )
        self.spectrum = nn.Parameter(spectrum if zero else spectrum.normal_(generator=generator))

    def delta_weight(self) -> Tensor:
        """Eq. (1) in the layout of the layer's weight."""
        in_features, out_features = features(self.base)
        delta = fourier_delta_weight(self._coefficients(), self.entries, out_features, in_features, self.scaling)
        return delta.mT if is_transposed(self.base) else delta

    def change(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Eq. (1) times x, by eq. (2) where that is cheaper."""
        in_features, out_features = features(self.base)
        if not spectral_is_cheaper(x.numel() // in_features, out_features, in_features, self.spectrum.numel()):
            return super().change(x)
        coefficients = self._coefficients()
        folded = _Folded(self.order, self.rows, self.columns, self._plain)  # type: ignore[arg-type]
        return _product(x.to(coefficients.dtype), coefficients, folded, out_features, self.scaling)

    def _coefficients(self) -> Tensor:
        return self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))


def _check_sizes(out_features: int, in_features: int, n: int) -> None:
    for name, value in (("out_features", out_features), ("in_features", in_features), ("n", n)):
        check_count(name, value)
    if n > out_features * in_features:
        raise ValueError(f"n: expected at most the {out_features} x {in_features} places of the spectrum, got {n}")


def _frequencies(config: dict[str, Any], path: str) -> int:
    """How many a layer has, by the rules of the peft library."""
    patterns: dict[str, int] = config.get("n_frequency_pattern") or {}
    key = next((key for key in patterns if re.match(rf".*\.{key}$", path)), path)
    return int(patterns.get(key, config["n_frequency"]))


def _save(found: dict[str, Adapter], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = {path: layer for path, layer in found.items() if isinstance(layer, FourierFTLinear)}
    settings = {(layer.scaling, layer.seed, layer.f_c) for layer in layers.values()}
    if len(settings) > 1 or name != "default":
        raise ValueError("model: expected the same scaling and seed on each layer, and no name but 'default'")
    ((scaling, seed, f_c),) = settings
    if f_c is not None:
        raise ValueError("model: the peft library knows no favoured frequency")
    counts = {path: layer.spectrum.numel() for path, layer in layers.items()}
    config = {
        "n_frequency": next(iter(counts.values())),
        "n_frequency_pattern": {p: n for p, n in counts.items() if n != next(iter(counts.values()))},
        "scaling": scaling,
        "random_loc_seed": seed,
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values()),
        "init_weights": False,
    }
    if any(_frequencies(config, path) != n for path, n in counts.items()):
        raise ValueError("model: paths end alike, so that the config can't say how many frequencies each layer has")
    return config, {f"{path}.fourierft_spectrum": layer.spectrum for path, layer in layers.items()}


def _load(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> list[str]:
    if name != "default":
        raise ValueError(f"name: expected 'default' for this kind of adapter, got {name!r}")
    spectra = {key.removesuffix(".fourierft_spectrum"): x for key, x in tensors.items()}
    layers = dict(model.named_modules())
    strange = [key for key in tensors if not key.endswith(".fourierft_spectrum")]
    strange += [path for path, x in spectra.items() if path not in layers or x.shape != (_frequencies(config, path),)]
    if strange:
        raise ValueError(f"adapter_model.safetensors: {strange[:3]} fits neither the model nor the config")

    def make(path: str, base: nn.Module) -> Adapter:
        n, scaling, seed = len(spectra[path]), config["scaling"], config["random_loc_seed"]
        layer = FourierFTLinear(base, n, scaling, seed=seed, zero=True)
        with torch.no_grad():
            layer.spectrum.copy_(spectra[path])
        return layer

    return inject(model, [re.escape(path) for path in spectra], make)


PEFT_FORMATS["FOURIERFT"] = PeftFormat(_save, _load)
