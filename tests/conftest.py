"""What all tests share: shapes and types are checked at run time, and hypothesis draws the same examples each time.

The hook has to be in place before anything of the two packages is imported, so it is installed when this file is.
"""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest

# An int is a float here as it is to a type checker (``dropout=0``). Annotations that can't be resolved at run time
# (names imported under TYPE_CHECKING) are not checked.
jaxtyping.install_import_hook(
    ["mlreviews", "mlreviews_kernels"],
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
