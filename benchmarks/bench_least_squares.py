"""Double descent on digits: all widths along one factorisation, or each from scratch.

Minimum-norm least squares on random Fourier features of scikit-learn's digits, 1,000 training points, for 60 widths up
to 10,000 features: test error, training error and norm of each. From scratch by LAPACK's SVD solver (`gelsd`, by way of
`torch.linalg.lstsq`) or by `torch.linalg.pinv`; or along the path of widths, by
`mlreviews.common.least_squares.nested_solutions`.

The last columns are the largest relative difference of test error and norm from `gelsd`, and the largest training error
from N = n on, which should be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from harness import Candidate, measure, parser, report, use_threads
from torch import Tensor

from mlreviews.common.least_squares import nested_solutions
from mlreviews.datasets import digits, one_hot
from mlreviews.generalization import RandomFourierFeatures


class Problem(NamedTuple):
    """Features of inputs (training points first) as a function of (start, stop), the targets of all, and n."""

    features: Callable[[int, int], Tensor]
    targets: Tensor
    n: int
    widths: list[int]


def problem(n: int, widths: list[int]) -> Problem:
    """Digits with a tenth of the training labels wrong."""
    generator = torch.Generator().manual_seed(0)
    train, test = digits().split([n, 597], generator)
    x = torch.cat([train.features, test.features]) / 16
    labels = torch.cat([train.with_label_noise(0.1, generator).targets, test.targets])
    features = RandomFourierFeatures(x.shape[1], widths[-1], 3.0, generator=generator)
    return Problem(partial(features, x), one_hot(labels, 10, dtype=torch.float64), n, widths)


def from_scratch(task: Problem, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each width by itself, on slices of the whole feature matrix."""
    phi, y = task.features(0, task.widths[-1]), task.targets[: task.n]
    rows = []
    for width in task.widths:
        a = solve(phi[: task.n, :width], y)
        rows.append(_errors(task, phi[:, :width] @ a, float(torch.linalg.norm(a))))
    return torch.tensor(rows, dtype=torch.float64)


def along_the_widths(task: Problem) -> Tensor:
    """All widths with one factorisation carried along."""
    points = nested_solutions(task.features, task.targets[: task.n], task.widths)
    return torch.tensor([_errors(task, point.predictions, point.norm) for point in points], dtype=torch.float64)


def gelsd(phi: Tensor, y: Tensor) -> Tensor:
    """LAPACK's divide-and-conquer SVD."""
    return torch.linalg.lstsq(phi, y, driver="gelsd").solution


def pinv(phi: Tensor, y: Tensor) -> Tensor:
    """The pseudo-inverse, formed and applied."""
    return torch.linalg.pinv(phi) @ y


def _errors(task: Problem, predictions: Tensor, norm: float) -> tuple[float, float, float]:
    squares = (predictions - task.targets).square()
    return float(squares[: task.n].mean()), float(squares[task.n :].mean()), norm


def _widths(n: int, widest: int) -> list[int]:
    """60 widths for n = 1,000, dense around n."""
    near = (0.92, 0.94, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998)
    around = {round(n * f) for close in near for f in (close, 1, 2 - close)}
    below = {round(n / 100 * 90 ** (i / 21)) for i in range(22)}
    above = {round(1.12 * n * (widest / (1.12 * n)) ** (i / 18)) for i in range(19)}
    return sorted(around | below | above)


def _candidates(n: int, widths: list[int]) -> list[Candidate]:
    prepare = partial(problem, n, widths)
    return [
        Candidate("gelsd", from_scratch, (gelsd,), prepare),
        Candidate("pinv", from_scratch, (pinv,), prepare),
        Candidate("path", along_the_widths, (), prepare),
    ]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    use_threads(arguments.threads)
    n, widest = (200, 2000) if arguments.quick else (1000, 10_000)
    widths = _widths(n, widest)
    if not arguments.quick:  # one call takes minutes, so the small problem warms up
        measure(_candidates(200, _widths(200, 2000)), rounds=1, warm_up=0, memory=False)
    measurements = measure(_candidates(n, widths), rounds=arguments.rounds or 3, warm_up=int(arguments.quick))
    truth = measurements[0].result
    for m in measurements:
        m.notes["Δ test"], m.notes["Δ norm"] = (m.result[:, 1:] / truth[:, 1:] - 1).abs().amax(0).tolist()
        m.notes["train"] = float(m.result[torch.tensor(widths) >= n, 0].max())
    settings = {"points": n, "widths": len(widths), "features at most": widest}
    report("least_squares", measurements, arguments, settings=settings)


if __name__ == "__main__":
    main()
