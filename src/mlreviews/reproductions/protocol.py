"""What a reproduction is: a function from settings to claims and series, and one that draws them.

A reproduction module has two functions::

    def run(settings: Settings) -> Outcome: ...
    def draw(outcome: Outcome) -> Figure: ...

``run`` measures. It calls `measure` for every claim, which computes the verdict from the measured values: nothing else
can set it. ``draw`` uses nothing but the outcome, so that a figure can be drawn again from a stored record.
Nothing in this module imports torch before a generator or a device is asked for.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Claim", "Outcome", "Record", "RecordError", "Settings", "Verdict", "measure"]

T = TypeVar("T")
Tracker = Callable[[Iterable[Any], str, int | None], Iterable[Any]]

# 97.5 % points of Student's t with 2 to 30 degrees of freedom; the last serves for more, where it is too wide by 4 %
# at most.
_T975 = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def _silent(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class Settings:
    """How an experiment is to be run.

    Attributes:
        full: the settings of the paper, or as near as is documented, instead of the quick ones.
        seed: of every generator; the same seed gives the same numbers on the same machine.
        device: where tensors live, as torch names it.
        tracker: shows progress; called by `track`.
    """

    full: bool = False
    seed: int = 0
    device: str = "cpu"
    tracker: Tracker = field(default=_silent, repr=False, compare=False)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """The items, with progress shown while they are gone through.

        Args:
            items: what to go through.
            description: what is being done, for the progress bar.
            total: how many items there are, where ``len(items)`` can't tell.
        """
        return self.tracker(items, description, total)

    def generator(self, stream: int = 0, *, device: str = "cpu") -> torch.Generator:
        """A random generator for one independent part of the experiment.

        Args:
            stream: which part; each number gives its own random stream under the same seed.
            device: where the generator draws.
        """
        import torch

        # A large odd multiplier keeps (seed, stream) pairs apart: seed 1, stream 0 is not seed 0, stream 1.
        return torch.Generator(device).manual_seed((self.seed * 1_000_003 + stream) % 2**63)


class Verdict(StrEnum):
    """What the measured values say of a claim."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Claim:
    """A statement, what was measured of it, and the bounds that decide. Made by `measure`.

    Attributes:
        statement: what is claimed, as a sentence.
        source: who claims it: paper with section or figure, or the review.
        measured: the value, or the mean over seeds.
        unit: of the measured value; "" for a pure number.
        at_least: the claim holds when the value is at least this; None where there is no lower bound.
        at_most: the claim holds when the value is at most this; None where there is no upper bound.
        interval: 95 % confidence interval of the mean over seeds; None for a value without sampling error.
        seeds: how many independent runs the value is the mean of.
    """

    statement: str
    source: str
    measured: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    interval: tuple[float, float] | None = None
    seeds: int = 1

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not bounds:
            raise ValueError(f"claim {self.statement!r}: needs at_least, at_most or both")
        if not all(map(math.isfinite, bounds)) or bounds != sorted(bounds):
            raise ValueError(f"claim {self.statement!r}: no value is within the bounds {bounds}")
        _check_finite(self.statement, (self.measured, *(self.interval or ())))

    @property
    def criterion(self) -> str:
        """The bounds in words, such as ``≥ 3``."""
        if self.at_least is None:
            return f"≤ {self.at_most:.4g}"
        if self.at_most is None:
            return f"≥ {self.at_least:.4g}"
        if self.at_least == self.at_most:
            return f"= {self.at_least:.4g}"
        return f"{self.at_least:.4g} to {self.at_most:.4g}"

    @property
    def verdict(self) -> Verdict:
        """Holds when the whole interval is within the bounds, does not when none of it is, else inconclusive."""
        least = -math.inf if self.at_least is None else self.at_least
        most = math.inf if self.at_most is None else self.at_most
        low, high = self.interval or (self.measured, self.measured)
        if least <= low and high <= most:
            return Verdict.HOLDS
        return Verdict.DOES_NOT_HOLD if high < least or low > most else Verdict.INCONCLUSIVE


def measure(
    statement: str,
    source: str,
    values: float | Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "",
) -> Claim:
    """Makes a claim out of what was measured; the bounds decide the verdict.

    Args:
        statement: what is claimed, as a sentence.
        source: who claims it: paper with section or figure, or the review.
        values: one number where there is no sampling error, or one per independent seed (at least three): then the
            mean and its 95 % confidence interval by Student's t are taken. A bound that the true mean violates is
            accepted by mistake in at most 2.5 % of experiments.
        at_least: lower bound, inclusive.
        at_most: upper bound, inclusive.
        unit: of the values.

    Raises:
        ValueError: no bound, bounds that cross, a number that is not finite, or one or two seeds, which are too few for
            an interval.
    """
    if isinstance(values, int | float):
        return Claim(statement, source, float(values), unit, at_least, at_most)
    runs = [float(v) for v in values]
    if len(runs) < 3:
        raise ValueError(f"claim {statement!r}: an interval needs at least 3 seeds, got {len(runs)}")
    _check_finite(statement, runs)
    mean = statistics.fmean(runs)
    half = _T975[min(len(runs) - 3, len(_T975) - 1)] * statistics.stdev(runs) / math.sqrt(len(runs))
    return Claim(statement, source, mean, unit, at_least, at_most, (mean - half, mean + half), len(runs))


def _check_finite(statement: str, values: Iterable[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"claim {statement!r}: measured {value}, expected a finite number")


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        claims: in the order in which they are to be read.
        series: the numbers behind the claims and the figure: name -> values. NaN marks a gap.
    """

    claims: Sequence[Claim]
    series: Mapping[str, Sequence[float]]


class RecordError(ValueError):
    """A stored record can't be read; the message names the file."""


@dataclass(frozen=True)
class Record:
    """An outcome with all that is needed to run it again.

    Attributes:
        slug: the technique.
        outcome: what was found.
        full: whether the full settings were used.
        seed: of the run.
        device: where it ran.
        seconds: wall time of ``run``.
        started: when, ISO 8601 in UTC.
        versions: package -> version.
        machine: processor, cores and threads.
    """

    slug: str
    outcome: Outcome
    full: bool
    seed: int
    device: str
    seconds: float
    started: str
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]

    def to_json(self) -> str:
        """The record as strict JSON: numbers of the series to 6 digits, NaN as null, verdicts written out."""
        claims = [
            {
                "statement": c.statement,
                "source": c.source,
                "measured": c.measured,
                "unit": c.unit,
                "at_least": c.at_least,
                "at_most": c.at_most,
                "interval": c.interval,
                "seeds": c.seeds,
                "verdict": c.verdict.value,
            }
            for c in self.outcome.claims
        ]
        series = {name: [_number(v) for v in values] for name, values in self.outcome.series.items()}
        head = {
            "slug": self.slug,
            "full": self.full,
            "seed": self.seed,
            "device": self.device,
            "seconds": round(self.seconds, 2),
            "started": self.started,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "claims": claims,
        }
        text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
        # One line a series: thousands of numbers, one a line, can't be read or compared.
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in series.items())
        return f'{text[:-2]},\n "series": {{\n{lines}\n }}\n}}\n'

    @classmethod
    def read(cls, path: Path) -> Record:
        """Reads a record that `to_json` wrote.

        Raises:
            RecordError: the file is not such a record.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            claims = [_claim(row) for row in data.pop("claims")]
            series = {
                name: [math.nan if v is None else float(v) for v in values]
                for name, values in data.pop("series").items()
            }
            return cls(outcome=Outcome(claims, series), **data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordError(f"{path}: not a record of a reproduction: {error}") from error


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _claim(row: dict[str, Any]) -> Claim:
    stored = row.pop("verdict")
    row["interval"] = tuple(row["interval"]) if row["interval"] else None
    claim = Claim(**row)
    if claim.verdict.value != stored:
        raise ValueError(f"claim {claim.statement!r}: verdict {stored!r} does not follow from its numbers")
    return claim
