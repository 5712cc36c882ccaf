"""A catalogue of made-up techniques with made-up reproductions, for tests of the runner and the command line."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import astuple
from pathlib import Path

from mlreviews.catalogue import Technique

SOURCE = Path(__file__).resolve().parent.parent / "src" / "mlreviews"

CATALOGUE = {
    "fakes": """
        [good-fake]
        short = "Good"
        title = "A Claim That Holds"
        kind = "algorithm"
        arxiv = "2401.00001"
        reviewed = "2024-01-02"

        [false-fake]
        short = "False"
        title = "A Claim That Does Not Hold"
        kind = "phenomenon"

        [failing-fake]
        short = "Failing"
        title = "An Experiment That Fails"
        kind = "procedure"

        [undrawable-fake]
        short = "Undrawable"
        title = "A Figure That Can Not Be Drawn"
        kind = "procedure"

        [slow-fake]
        short = "Slow"
        title = "An Experiment That Never Ends"
        kind = "procedure"

        [slow-too-fake]
        short = "Slow, too"
        title = "Another One"
        kind = "procedure"

        [dying-fake]
        short = "Dying"
        title = "An Experiment That Ends Its Process"
        kind = "procedure"

        [2nd-planned-fake]
        short = "Planned [b]"
        title = "A Technique That Is Only Planned"
        kind = "algorithm"
        reviewed = "2024-03"
        """,
    "others": """
        [written-fake]
        short = "Written"
        title = "A Technique Without Reproduction"
        kind = "algorithm"
        arxiv = "2402.00002"
        """,
}

MODULE = '''
    r"""{short}: a made-up technique.

    Paper: A Claim That Holds (arXiv:2401.00001).

    It multiplies a tensor by
    two.

    Equation:
        $$ y = 2 x \\tag{{1}} $$

    Symbols:
        x: [batch, features], the input.

    Defaults:
        none.

    Deviations:
        none.

    Reduces to:
        {reduces_to}
    """

    import torch

    __all__ = ["double"]


    def double(x: "Float[Tensor, 'batch features']", factor: float = 2.0) -> "Float[Tensor, 'batch features']":
        """Multiplies by two."""
        return factor * x
    '''

EXPERIMENT = """
    import math, os, time
    from pathlib import Path

    import torch
    from matplotlib.figure import Figure

    from mlreviews.reproductions.protocol import Outcome, measure


    def run(settings):
        for _ in settings.track(range(3), "measuring"):
            pass
        {extra}
        values = [0.5, 1.0 + settings.seed, float(torch.rand(()))]
        claim = measure("The value is {statement}.", "Anon., section 1", values, at_least={bound}, unit="nats")
        return Outcome([claim], {{"curve": [values[1], math.nan, *values]}})


    def draw(outcome):
        {drawing}
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot(outcome.series["curve"])
        return figure
    """

SLOW = "Path(f'started-{os.getpid()}').touch(); time.sleep(600)"
EXPERIMENTS = {
    "good_fake": {},
    "false_fake": {"bound": "1000.0", "statement": "large"},
    "failing_fake": {"extra": "raise ValueError('the data are bent\\nin two places')"},
    "undrawable_fake": {"drawing": "raise ValueError('no such colour')"},
    "slow_fake": {"extra": SLOW},
    "slow_too_fake": {"extra": SLOW},
    "dying_fake": {"extra": "os._exit(3)"},
}


def write(package: Path) -> None:
    """Writes the fakes into a folder that has the shape of the package."""
    for area in CATALOGUE:
        for folder in (package / area, package / "reproductions" / area):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
    (package / "catalogue").mkdir(exist_ok=True)
    for area, rows in CATALOGUE.items():
        (package / "catalogue" / f"{area}.toml").write_text(textwrap.dedent(rows))
    modules = {
        "others/written_fake.py": ("Written", "good-fake: with a factor of two,\n        always."),
        "fakes/good_fake.py": ("Good", "none."),
        **{f"fakes/{name}.py": (name, "torch.nn.Linear: always.") for name in EXPERIMENTS if name != "good_fake"},
    }
    for path, (short, target) in modules.items():
        (package / path).write_text(textwrap.dedent(MODULE).strip().format(short=short, reduces_to=target))
    for name, parts in EXPERIMENTS.items():
        usual = {"extra": "pass", "drawing": "pass", "statement": "at least minus a thousand", "bound": "-1000.0"}
        (package / "reproductions" / "fakes" / f"{name}.py").write_text(
            textwrap.dedent(EXPERIMENT).format(**(usual | parts))
        )


def write_package(folder: Path) -> None:
    """A copy of the package whose only techniques are the fakes: for tests in processes of their own."""
    package = folder / "mlreviews"
    parts = (SOURCE, *(SOURCE / name for name in ("cli", "catalogue", "reproductions")))
    for file in (file for part in parts for file in part.glob("*.py")):
        target = package / file.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    write(package)


class Portable(Technique):
    """A fake that other processes find as well: its reproduction is on the path, not in the package."""

    @classmethod
    def of(cls, technique: Technique) -> Portable:
        return cls(*astuple(technique))

    @property
    def reproduction(self) -> str:
        return f"fakes.{self.module_name}"

    @property
    def reproduced(self) -> bool:
        return True
