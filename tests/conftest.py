"""What all tests share: shapes and types are checked at run time, and hypothesis draws the same examples each time.

The hook has to be in place before anything of the two packages is imported, so it is installed when this file is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Triton's own functions are decorated when it is imported, so it has to know by then that it interprets.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import jaxtyping
import pytest

if TYPE_CHECKING:
    from mlreviews.catalogue import Technique

# An int is a float here as it is to a type checker (``dropout=0``). Annotations that can't be resolved at run time
# (names imported under TYPE_CHECKING) are not checked.
jaxtyping.install_import_hook(
    "mlreviews",  # not the kernels: they import torch only, and torch.library reads their annotations
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

hypothesis.settings.register_profile("mlreviews", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("mlreviews")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The run-time checks of annotations off, as users run the library: for tests of its own errors on bad input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Technique]:
    """The catalogue of `tests.fakes` in place of the real one; the current folder is an empty one."""
    import mlreviews.reproductions
    from mlreviews import catalogue
    from tests.fakes import write

    package = tmp_path / "source" / "mlreviews"
    write(package)
    found = catalogue.load_catalogue(package / "catalogue")
    monkeypatch.setattr(catalogue, "PACKAGE", package)
    monkeypatch.setattr(catalogue, "CHECKOUT", None)
    monkeypatch.setattr(catalogue, "techniques", lambda: found)
    monkeypatch.setattr(mlreviews.reproductions, "__path__", [str(package / "reproductions")])
    for name in [name for name in sys.modules if name.startswith("mlreviews.reproductions.fakes")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found
