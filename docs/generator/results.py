"""Claims, verdicts and provenance of a record as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from markup import prose, table

from mlreviews.reproductions.protocol import Claim, Record, Verdict

MARKS = {Verdict.HOLDS: "✓", Verdict.DOES_NOT_HOLD: "✗", Verdict.INCONCLUSIVE: "?"}
PLURAL = {Verdict.HOLDS: "hold", Verdict.DOES_NOT_HOLD: "do not hold"}


def verdict(value: Verdict, count: int | None = None) -> str:
    """A verdict as mark and words, or as mark and count."""
    words = value.value if count in (None, 1) else PLURAL.get(value, value.value)
    text = words if count is None else f"{count} {words}"
    return f'<span class="verdict {value.name.lower()}"><span aria-hidden="true">{MARKS[value]}</span> {text}</span>'


def verdicts(claims: Iterable[Claim]) -> str:
    """How many claims hold, do not, and are open; what there is none of is left out."""
    counts = Counter(claim.verdict for claim in claims)
    return " ".join(verdict(value, counts[value]) for value in Verdict if counts[value])


def measured(claim: Claim) -> str:
    """The measured value with its unit, and below it the interval where there is one."""
    value = f"{claim.measured:.4g} {claim.unit}".strip()
    if claim.interval is None:
        return value
    low, high = claim.interval
    spread = f"95 %: {low:.4g} to {high:.4g}, {claim.seeds} seeds" if low < high else f"in each of {claim.seeds} seeds"
    return f"{value}<br><small>{spread}</small>"


def claims_table(claims: Iterable[Claim]) -> str:
    """The claims of a record."""
    return table(
        ["Claim", "Measured", "Criterion", "Verdict"],
        (
            [
                f"{c.statement}<br><small>{prose(c.source)}</small>",
                measured(c),
                f"{c.criterion} {c.unit}".strip(),
                verdict(c.verdict),
            ]
            for c in claims
        ),
    )


def command(record: Record) -> str:
    """The command line that runs a reproduction as the record was."""
    options = " --full" if record.full else ""
    options += f" --seed {record.seed}" if record.seed else ""
    options += f" --device {record.device}" if record.device != "cpu" else ""
    return f"mlreviews reproduce {record.slug}{options}"


def provenance(record: Record) -> str:
    """With what a record was made."""
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    machine = ", ".join(
        f"{name} {value}" if isinstance(value, int) else value for name, value in record.machine.items()
    )
    return table(
        ["", ""],
        [
            ["Settings", "full" if record.full else "quick"],
            ["Seed", str(record.seed)],
            ["Run", f"{record.started[:10]}, {record.seconds:.1f} s on {record.device}"],
            ["Versions", versions],
            ["Machine", machine],
        ],
    )
