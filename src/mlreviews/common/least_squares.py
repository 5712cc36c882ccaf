r"""Minimum-norm and ridge least squares, accurate at the interpolation threshold, also along nested widths.

Everything is computed in float64, whatever the dtype of the input. Let $\epsilon = 2.2 \cdot 10^{-16}$, and $\kappa$
the ratio of the largest to the smallest singular value of the features (with a ridge: of the features with the rows
$\sqrt\lambda I$ below them). Relative errors of the coefficients are about

- $\epsilon \kappa$ for `min_norm_solve` (singular value decomposition) and wherever a QR factorisation is used, and
  $\epsilon \kappa^2 \|r\| / (\|\Phi\| \|a\|)$ more where a residual r is left: no method does better, since rounding
  the features has the same effect;
- at most $10^{-8}$ where a Gram matrix is factored by Cholesky. Its error is about $\epsilon \kappa^2$, and it is used
  only where an estimate of that is below the bound.

With more columns than rows the minimum-norm solution is $a = \Phi^\top c$ with $T^\top T c = y$, where
$\Phi^\top = Q T$. Without $Q$ that looks like normal equations, but as long as $T$ comes from QR its error grows with
$\kappa$, not with $\kappa^2$ (Paige 1973; Demmel and Higham 1993).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_matrix, check_number, check_same_length

__all__ = ["PathPoint", "min_norm_solve", "nested_solutions", "ridge_solve"]

Columns = Callable[[int, int], Tensor]

_EPS = torch.finfo(torch.float64).eps
_GRAM_ERROR = 1e-8


def min_norm_solve(
    features: Float[Tensor, "n p"], targets: Float[Tensor, " n"] | Float[Tensor, "n k"], *, rcond: float | None = None
) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
    r"""The shortest of all minimisers of $\|\Phi a - y\|^2$, that is $\Phi^+ y$, by singular value decomposition.

    Args:
        features: $\Phi$.
        targets: $y$, one or several columns.
        rcond: singular values up to this fraction of the largest count as zero; None means $\epsilon \max(n, p)$.

    Returns:
        The coefficients, in the dtype of the features.

    Raises:
        ValueError: empty, not finite, different numbers of rows, or rcond outside [0, 1).
    """
    phi, y = _checked(features, targets)
    cut = _cutoff(rcond, *phi.shape)
    # gelsd is LAPACK's divide-and-conquer SVD solver; torch has it on the CPU only.
    solution = torch.linalg.lstsq(phi.cpu(), y.cpu(), rcond=cut, driver="gelsd").solution
    return solution.to(features).reshape(-1, *targets.shape[1:])


def ridge_solve(
    features: Float[Tensor, "n p"], targets: Float[Tensor, " n"] | Float[Tensor, "n k"], ridge: float
) -> Float[Tensor, " p"] | Float[Tensor, "p k"]:
    r"""The minimiser of $\|\Phi a - y\|^2 + \lambda \|a\|^2$, from the smaller one of the p x p and n x n systems.

    Args:
        features: $\Phi$.
        targets: $y$, one or several columns.
        ridge: $\lambda > 0$; for the limit 0 take `min_norm_solve`.

    Returns:
        The coefficients, in the dtype of the features.

    Raises:
        ValueError: empty, not finite, different numbers of rows, or a ridge that is not positive.
    """
    check_number("ridge", ridge, above=0.0)
    phi, y = _checked(features, targets)
    n, p = phi.shape
    tall = phi if p <= n else phi.T
    upper = _shifted_cholesky(tall.T @ tall, ridge)
    if upper is None:
        q, upper = torch.linalg.qr(_augmented(tall, ridge))
        q = q[: len(tall)]
        a = _solve(upper, q.T @ y) if p <= n else q @ _solve_transposed(upper, y)
    elif p <= n:
        a = torch.cholesky_solve(tall.T @ y, upper, upper=True)
    else:
        a = tall @ torch.cholesky_solve(y, upper, upper=True)
    return a.to(features).reshape(-1, *targets.shape[1:])


@dataclass(frozen=True)
class PathPoint:
    """The solution for one width and ridge.

    Attributes:
        width: how many of the columns are used.
        ridge: the penalty.
        predictions: for every row of the features, those of the training rows first; float64.
        norm: Frobenius norm of the coefficients.
        method: what was factored: "qr", "cholesky", "qr-update", or "svd" where the rank is deficient.
    """

    width: int
    ridge: float
    predictions: Float[Tensor, " rows"] | Float[Tensor, "rows k"]
    norm: float
    method: str


def nested_solutions(
    features: Float[Tensor, "rows p"] | Columns,
    targets: Float[Tensor, " n"] | Float[Tensor, "n k"],
    widths: Sequence[int],
    *,
    ridges: Sequence[float] = (0.0,),
    rcond: float | None = None,
) -> Iterator[PathPoint]:
    r"""Solves for the first N columns, for every N of a list, with one factorisation that is carried along.

    Up to N = n the leading blocks of one QR factorisation serve all widths. Beyond, $\Phi_N \Phi_N^\top$ is summed up
    as columns come and factored by Cholesky where that is accurate enough (see above). Elsewhere, which is near N = n,
    the triangle $T$ of $\Phi_N^\top = Q T$ is updated by a QR of itself stacked on the new columns. Where the rank is
    numerically deficient the SVD of the triangle takes over, with the rule of `min_norm_solve`.
    At most 2n columns are held at a time.

    Args:
        features: the matrix, or a function from (start, stop) to its columns start:stop, which may be asked for the
            same range again. The first n rows are fitted to the targets; the predictions are for all rows.
        targets: $y$, one or several columns.
        widths: the N, strictly increasing.
        ridges: the penalties $\lambda$ to solve each width for; 0 is the minimum-norm solution.
        rcond: as in `min_norm_solve`; None means $\epsilon \max(n, N)$.

    Returns:
        An iterator over `PathPoint`, by width, then by ridge.

    Raises:
        ValueError: empty or not finite data, fewer rows than targets, widths below 1, not increasing or beyond the
            features, negative ridges, or rcond outside [0, 1).
    """
    check_matrix("targets", targets, dims=(1, 2))
    if not widths or not ridges:
        raise ValueError(f"widths and ridges: expected at least one of each, got {len(widths)} and {len(ridges)}")
    for width in widths:
        check_count("widths", width)
    if any(b <= a for a, b in itertools.pairwise(widths)):
        raise ValueError(f"widths: expected strictly increasing numbers, got {list(widths)}")
    for ridge in ridges:
        check_number("ridges", ridge, least=0.0)
    _cutoff(rcond, 1, 1)
    if isinstance(features, Tensor):
        check_matrix("features", features)
        if widths[-1] > features.shape[1]:
            raise ValueError(f"widths: expected at most the {features.shape[1]} columns of features, got {widths[-1]}")
    columns = _checked_columns(features, len(targets))
    y = targets.double().reshape(len(targets), -1)
    return _path(columns, y, list(widths), list(ridges), rcond, targets.shape[1:])


def _path(
    columns: Columns, y: Tensor, widths: list[int], ridges: list[float], rcond: float | None, shape: torch.Size
) -> Iterator[PathPoint]:
    narrow = [width for width in widths if width <= len(y)]
    if narrow:
        yield from _along(_Narrow(columns(0, narrow[-1]), y), narrow, ridges, rcond, shape)
    if wide := widths[len(narrow) :]:
        yield from _along(_Wide(columns, y), wide, ridges, rcond, shape)


def _along(
    solver: _Narrow | _Wide, widths: list[int], ridges: list[float], rcond: float | None, shape: torch.Size
) -> Iterator[PathPoint]:
    for width in widths:
        solver.grow(width)
        for ridge in ridges:
            predictions, norm, method = solver.solve(ridge, _cutoff(rcond, len(solver.y), width))
            yield PathPoint(width, ridge, predictions.reshape(-1, *shape), norm, method)


class _Narrow:
    """Widths up to n: leading blocks of one QR factorisation of the first columns."""

    def __init__(self, phi: Tensor, y: Tensor) -> None:
        reflectors, tau = torch.geqrf(phi[: len(y)])
        self.phi, self.y = phi, y
        self.triangle = reflectors[: phi.shape[1]].triu()
        self.rotated = torch.ormqr(reflectors, tau, y, left=True, transpose=True)
        self.gram = self.triangle.T @ self.triangle  # its leading blocks are the Gram matrices of the smaller widths
        self.width = 0

    def grow(self, width: int) -> None:
        self.width = width

    def solve(self, ridge: float, cut: float) -> tuple[Tensor, float, str]:
        r, z = self.triangle[: self.width, : self.width], self.rotated[: self.width]
        if ridge > 0:
            a, method = self._ridge(r, z, ridge)
        elif _deficient(r, cut):
            u, s, vt = _truncated_svd(r, cut)
            a, method = vt.T @ ((u.T @ z) / s[:, None]), "svd"
        else:
            a, method = _solve(r, z), "qr"
        return self.phi[:, : self.width] @ a, float(torch.linalg.norm(a)), method

    def _ridge(self, r: Tensor, z: Tensor, ridge: float) -> tuple[Tensor, str]:
        upper = _shifted_cholesky(self.gram[: self.width, : self.width], ridge)
        if upper is not None:
            return torch.cholesky_solve(r.T @ z, upper, upper=True), "cholesky"
        q, upper = torch.linalg.qr(_augmented(r, ridge))
        return _solve(upper, q[: self.width].T @ z), "qr"


class _Wide:
    """Widths above n: the products of all rows with the training rows; on demand a triangle T with T'T = Phi Phi'."""

    def __init__(self, columns: Columns, y: Tensor) -> None:
        self.columns, self.y = columns, y
        self.head = columns(0, len(y))  # kept, because near N = n it is almost everything, and needed often
        self.products = self.triangle = y.new_empty(0)
        # Columns are always asked for in these ranges: how they are rounded may depend on the range.
        self.ranges: list[tuple[int, int]] = []
        self.factored = 0  # so many ranges are in the triangle

    def grow(self, width: int) -> None:
        n = len(self.y)
        for first in range(self.ranges[-1][1] if self.ranges else 0, width, n):
            self.ranges.append((first, min(first + n, width)))
            block = self._block(-1)
            product = block @ block[:n].T
            self.products = self.products.add_(product) if first else product

    def solve(self, ridge: float, cut: float) -> tuple[Tensor, float, str]:
        gram = self.products[: len(self.y)]
        upper = _shifted_cholesky(gram, ridge)
        if upper is not None:
            c = torch.cholesky_solve(self.y, upper, upper=True)
            predictions = self.products @ c
            return predictions, math.sqrt(max(0.0, float((c * predictions[: len(c)]).sum()))), "cholesky"
        t = self._current_triangle()
        if ridge == 0 and _deficient(t, cut):
            _, s, vt = _truncated_svd(t, cut)
            method, dual = "svd", lambda right: vt.T @ ((vt @ right) / s[:, None] ** 2)
        else:
            upper = torch.linalg.qr(_augmented(t, ridge), mode="r").R if ridge > 0 else t
            method, dual = "qr-update", lambda right: _solve(upper, _solve_transposed(upper, right))
        c = dual(self.y)
        step = dual(self.y - self._predict(c)[: len(c)] - ridge * c)
        return self._predict(c, step), float(torch.linalg.norm(t @ (c + step))), method

    def _predict(self, *duals: Tensor) -> Tensor:
        """Applies the features to the coefficients Phi' c, summed over the duals c.

        The products that `grow` sums up would be quicker but hide the residual that rounding errors of Phi' c leave at
        the training points. Seen, it is removed by one correction (to rounding level as long as kappa < 1e9).
        """
        blocks = map(self._block, range(len(self.ranges)))
        return torch.stack([block @ sum(block[: len(c)].T @ c for c in duals) for block in blocks]).sum(0)

    def _current_triangle(self) -> Tensor:
        for i in range(self.factored, len(self.ranges)):
            rows = self._block(i)[: len(self.y)].T
            self.triangle = torch.linalg.qr(torch.cat([self.triangle, rows]) if i else rows, mode="r").R
        self.factored = len(self.ranges)
        return self.triangle

    def _block(self, i: int) -> Tensor:
        start, stop = self.ranges[i]
        return self.columns(start, stop) if start else self.head


def _checked(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("features", features)
    check_matrix("targets", targets, dims=(1, 2))
    check_same_length(features=features, targets=targets)
    return features.double(), targets.double().reshape(len(targets), -1)


def _checked_columns(features: Tensor | Columns, n: int) -> Columns:
    known = 0

    def columns(start: int, stop: int) -> Tensor:
        nonlocal known
        block = features[:, start:stop] if isinstance(features, Tensor) else features(start, stop)
        if stop > known:  # what has been looked at need not be looked at again
            check_matrix("features", block)
            known = stop
        if block.shape[1] != stop - start or len(block) < n:
            raise ValueError(
                f"features: expected at least {n} rows and the columns {start}:{stop}, got shape {tuple(block.shape)}"
            )
        return block.double()

    return columns


def _cutoff(rcond: float | None, n: int, width: int) -> float:
    if rcond is None:
        return _EPS * max(n, width)
    if not 0 <= rcond < 1:
        raise ValueError(f"rcond: expected a number in [0, 1), got {rcond}")
    return rcond


def _shifted_cholesky(gram: Tensor, ridge: float) -> Tensor | None:
    """The upper Cholesky factor of gram + ridge I, or None where its error would be above the bound."""
    shifted = gram.clone()
    shifted.diagonal().add_(ridge)
    upper, failed = torch.linalg.cholesky_ex(shifted, upper=True)
    if failed:
        return None
    # The trace bounds the largest eigenvalue; the ridge bounds the smallest one and often saves the estimate.
    smallest_allowed = float(shifted.trace()) * _EPS / _GRAM_ERROR
    return upper if ridge >= smallest_allowed or _smallest_singular_value(upper) ** 2 >= smallest_allowed else None


def _smallest_singular_value(upper: Tensor) -> float:
    """Estimates it from above by inverse iteration, usually to within a factor of two; 0 for a singular triangle."""
    if not bool(upper.diagonal().all()):
        return 0.0
    start = torch.Generator().manual_seed(0)
    v = torch.randn(len(upper), 3, dtype=torch.float64, generator=start).to(upper.device)
    for _ in range(3):
        v = _solve(upper, _solve_transposed(upper, v / torch.linalg.norm(v, dim=0)))
    growth = float(torch.linalg.norm(v, dim=0).max())
    return growth**-0.5 if math.isfinite(growth) else 0.0


def _deficient(triangle: Tensor, cut: float) -> bool:
    # The Frobenius norm is at least the largest singular value: rather one SVD too many.
    return _smallest_singular_value(triangle) <= cut * float(torch.linalg.norm(triangle))


def _truncated_svd(matrix: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix)
    kept = s > cut * s[0]
    return u[:, kept], s[kept], vt[kept]


def _augmented(tall: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
    return torch.cat([tall, math.sqrt(ridge) * identity])


def _solve(upper: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(upper, right, upper=True)


def _solve_transposed(upper: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(upper.T, right, upper=False)
