"""The data sets that ship with scikit-learn, each as a `Table`; nothing is downloaded.

::

    digits().features           # float64 [1797, 64]
    load("iris").target_names   # ("setosa", "versicolor", "virginica")
"""

from __future__ import annotations

import difflib
from typing import Any

import torch

from mlreviews.datasets.tables import Table

__all__ = ["TABLES", "breast_cancer", "diabetes", "digits", "iris", "linnerud", "load", "wine"]

_CC_BY = "CC BY 4.0 (as listed by the UCI Machine Learning Repository)"
_UNSTATED = "not stated by the authors; distributed with scikit-learn (BSD-3-Clause)"


def load(name: str) -> Table:
    """The data set of that name, one of `TABLES`; as the function of that name gives it.

    Raises:
        ValueError: no such data set; the message suggests the nearest name.
        ImportError: scikit-learn is not installed.
    """
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TABLES)}"
        raise ValueError(f"name: no data set is called {name!r}; {hint}")
    return _LOADERS[name]()


def digits() -> Table:
    """Handwritten digits: 1,797 images of 8 x 8 pixels, row by row, each 0 to 16; 10 classes, some constant pixels."""
    return _bundled(
        "digits", "Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, test part", _CC_BY
    )


def iris() -> Table:
    """Fisher's iris flowers: 150 rows, 4 lengths and widths in cm; 3 classes of 50."""
    return _bundled("iris", "Fisher (1936), The use of multiple measurements in taxonomic problems", _CC_BY)


def wine() -> Table:
    """Wines of three cultivators: 178 rows, 13 chemical measurements; 3 classes."""
    return _bundled("wine", "Forina et al., PARVUS: An Extendible Package of Programs for Data Exploration", _CC_BY)


def breast_cancer() -> Table:
    """Breast cancer Wisconsin (diagnostic): 569 rows, 30 measurements of cell nuclei; malignant (0) and benign (1)."""
    return _bundled(
        "breast_cancer", "Wolberg, Street and Mangasarian (1995), Breast Cancer Wisconsin (Diagnostic)", _CC_BY
    )


def diabetes() -> Table:
    """Diabetes progression after a year: 442 rows, 10 baseline variables in their own units; regression on one number.

    scikit-learn's default scales the features by statistics of all rows, test rows included; here they are as
    measured.
    """
    return _bundled(
        "diabetes", "Efron, Hastie, Johnstone and Tibshirani (2004), Least Angle Regression", _UNSTATED, scaled=False
    )


def linnerud() -> Table:
    """Physical exercise of 20 men: 3 exercises; regression on weight, waist and pulse."""
    return _bundled("linnerud", "Tenenhaus (1998), La régression PLS, after A. C. Linnerud", _UNSTATED)


def _bundled(name: str, source: str, licence: str, **settings: bool) -> Table:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"{name}: the data comes with scikit-learn; pip install 'mlreviews[data]'") from error
    bunch: Any = getattr(datasets, f"load_{name}")(**settings)
    targets = torch.from_numpy(bunch.target)
    names = bunch.get("target_names", ["progression"])
    return Table(
        name=name,
        features=torch.from_numpy(bunch.data).to(torch.float64).contiguous(),
        targets=targets.to(torch.float64) if targets.is_floating_point() else targets.to(torch.int64),
        feature_names=tuple(map(str, bunch.feature_names)),
        target_names=tuple(map(str, names)),
        source=source,
        licence=licence,
    )


_LOADERS = {loader.__name__: loader for loader in (breast_cancer, diabetes, digits, iris, linnerud, wine)}
TABLES = tuple(_LOADERS)
