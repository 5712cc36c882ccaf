import importlib.util
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch

from mlreviews import datasets
from mlreviews.datasets import TABLES, Table, load

# n, features, and classes or shape of the regression targets
SIZES: dict[str, tuple[int, int, int | tuple[int, ...]]] = {
    "breast_cancer": (569, 30, 2),
    "diabetes": (442, 10, (442,)),
    "digits": (1797, 64, 10),
    "iris": (150, 4, 3),
    "linnerud": (20, 3, (20, 3)),
    "wine": (178, 13, 3),
}


def test_there_are_as_many_as_scikit_learn_ships() -> None:
    shipped = {name.removeprefix("load_") for name in dir(sklearn.datasets) if name.startswith("load_")}
    readers = {"files", "sample_image", "sample_images", "svmlight_file", "svmlight_files"}
    assert set(TABLES) == shipped - readers == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_holds_the_data_of_scikit_learn(name: str) -> None:
    table = load(name)
    n, d, target = SIZES[name]
    bunch = getattr(sklearn.datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    assert table.name == name
    assert (table.features.shape, table.features.dtype) == ((n, d), torch.float64)
    assert table.features.is_contiguous()
    np.testing.assert_array_equal(table.features.numpy(), bunch.data)
    np.testing.assert_array_equal(table.targets.numpy(), bunch.target)
    assert table.feature_names == tuple(bunch.feature_names)
    if isinstance(target, int):
        assert table.classes == target
        assert table.targets.dtype == torch.int64
        assert table.target_names == tuple(map(str, bunch.target_names))
        assert len(table.targets.unique()) == target
    else:
        assert (table.targets.shape, table.targets.dtype) == (target, torch.float64)
        assert len(table.target_names) == (target[1] if len(target) == 2 else 1)
    assert table.source
    assert "CC BY 4.0" in table.licence or "BSD" in table.licence


@pytest.mark.parametrize("name", SIZES)
def test_each_has_a_function_of_its_own(name: str) -> None:
    table: Table = getattr(datasets, name)()
    assert table.name == name
    assert torch.equal(table.features, load(name).features)


def test_diabetes_is_not_scaled_by_statistics_of_all_rows() -> None:
    age = datasets.diabetes().features[:, 0]
    assert (int(age.min()), int(age.max())) == (19, 79)  # years


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"name: no data set is called 'digit'; did you mean 'digits'\?"):
        load("digit")
    with pytest.raises(ValueError, match=r"there are breast_cancer, diabetes, digits, iris, linnerud, wine"):
        load("zzz")


def test_without_scikit_learn_only_the_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    spec = importlib.util.find_spec("mlreviews.datasets.bundled")
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(ImportError, match=r"iris: .*pip install 'mlreviews\[data\]'"):
        fresh.iris()
