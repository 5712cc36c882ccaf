from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mlreviews import catalogue
from mlreviews.catalogue import (
    CatalogueError,
    Technique,
    UnknownTechniqueError,
    areas,
    find,
    load_catalogue,
    nearest,
    read_area,
    techniques,
)

GOOD = """
[lora]
short = "LoRA"
title = "LoRA: Low-Rank Adaptation"
kind = "algorithm"
arxiv = "2106.09685"
reviewed = "2024-08-01"

[2-bit-kv-cache]
short = "KIVI"
title = "A Tuning-Free Asymmetric 2bit Quantization"
kind = "procedure"
"""
LORA = Technique("lora", "peft", "LoRA", "LoRA: Low-Rank Adaptation", "algorithm", "2106.09685", "2024-08-01")


def write(folder: Path, area: str, text: str) -> Path:
    path = folder / f"{area}.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout in place of this one."""
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path / "src" / "mlreviews")
    monkeypatch.setattr(catalogue, "CHECKOUT", tmp_path)
    return tmp_path / "src" / "mlreviews"


def touch(path: Path | None, text: str = "") -> None:
    assert path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_loading_the_catalogue_loads_no_torch() -> None:
    code = "import sys; from mlreviews.catalogue import *; techniques(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# Rows


def test_an_area_is_read_in_its_order(tmp_path: Path) -> None:
    first, second = read_area(write(tmp_path, "peft", GOOD))
    assert first == LORA
    assert (second.slug, second.kind, second.arxiv, second.reviewed) == ("2-bit-kv-cache", "procedure", "", "")
    assert second.area == "peft"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", '"trick"', "kind = 'trick' does not match algorithm|procedure|phenomenon"),
        ("kind", '"algorithms"', "kind = 'algorithms' does not match"),
        ("arxiv", '"2106.968"', "arxiv = '2106.968' does not match"),
        ("arxiv", '"arXiv:2106.09685"', "arxiv = 'arXiv:2106.09685' does not match"),
        ("arxiv", "2106.09685", "arxiv = 2106.09685 does not match"),
        ("reviewed", '"2024"', "reviewed = '2024' does not match"),
        ("reviewed", '"2024-8"', "reviewed = '2024-8' does not match"),
        ("reviewed", "2024-08-01", "reviewed = datetime.date(2024, 8, 1) does not match"),
        ("short", '""', "short = '' does not match"),
        ("title", '["LoRA"]', "title = ['LoRA'] does not match"),
        ("title", None, "the field 'title' is missing"),
        ("short", None, "the field 'short' is missing"),
        ("kind", None, "the field 'kind' is missing"),
        ("year", "2021", "unknown field 'year'; the fields are short, title, kind, arxiv, reviewed"),
    ],
)
def test_a_broken_row_names_file_slug_and_field(tmp_path: Path, field: str, value: str | None, message: str) -> None:
    facts = {"short": '"LoRA"', "title": '"LoRA"', "kind": '"algorithm"', "arxiv": '"2106.09685"'}
    facts |= {field: value} if value else {}
    lines = [f"{name} = {fact}" for name, fact in facts.items() if value or name != field]
    with pytest.raises(CatalogueError) as caught:
        read_area(write(tmp_path, "peft", "\n".join(["[lora]", *lines])))
    assert str(caught.value).startswith(f"peft.toml [lora]: {message}")


@pytest.mark.parametrize("left_out", ["arxiv", "reviewed"])
def test_some_facts_may_be_unknown(tmp_path: Path, left_out: str) -> None:
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(left_out))
    assert read_area(write(tmp_path, "peft", text))[0] == dataclasses.replace(LORA, **{left_out: ""})


@pytest.mark.parametrize("slug", ["LoRA", "lo_ra", "-lora", "lora-", "lo--ra", "lo ra", "löra"])
def test_bad_slugs(tmp_path: Path, slug: str) -> None:
    with pytest.raises(
        CatalogueError, match=rf"peft\.toml \[{slug}\]: the slug must be lower-case words joined by hyphens"
    ):
        read_area(write(tmp_path, "peft", f'["{slug}"]\nshort = "x"'))


def test_a_fact_outside_of_any_table(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"peft\.toml \[short\]: expected a table of facts, got 'LoRA'"):
        read_area(write(tmp_path, "peft", 'short = "LoRA"\n'))


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"^peft\.toml: not valid TOML: .*line 2"):
        read_area(write(tmp_path, "peft", '[lora]\nshort = "LoRA\n'))
    with pytest.raises(CatalogueError, match=r"^peft\.toml: not valid TOML: .*lora"):
        read_area(write(tmp_path, "peft", GOOD + "[lora]\n"))
    path = tmp_path / "peft.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(CatalogueError, match=r"^peft\.toml: not valid TOML: .*decode"):
        read_area(path)


def test_areas_are_read_in_alphabetical_order(tmp_path: Path) -> None:
    write(tmp_path, "ssm", GOOD.replace("[lora]", "[mamba]").replace("2-bit", "3-bit"))
    write(tmp_path, "peft", GOOD)
    (tmp_path / "README.md").write_text("no area")
    found = load_catalogue(tmp_path)
    assert list(found) == ["lora", "2-bit-kv-cache", "mamba", "3-bit-kv-cache"]
    assert [technique.area for technique in found.values()] == ["peft", "peft", "ssm", "ssm"]
    assert load_catalogue(tmp_path / "none") == {}


def test_a_slug_in_two_areas(tmp_path: Path) -> None:
    write(tmp_path, "peft", GOOD)
    write(tmp_path, "ssm", GOOD)
    with pytest.raises(CatalogueError, match=r"^ssm\.toml \[lora\]: already in peft\.toml$"):
        load_catalogue(tmp_path)


# Look-up


def test_areas_hold_all_techniques() -> None:
    grouped = areas()
    assert [t for area in grouped.values() for t in area] == list(techniques().values())
    assert all(technique.area == area for area, found in grouped.items() for technique in found)
    assert find("lora") is techniques()["lora"]
    assert techniques() is techniques()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lorra", "no technique is called 'lorra'; did you mean lora"),
        ("Double_Descent", "no technique is called 'Double_Descent'; did you mean double-descent"),
        ("qqqqqqqq", "no technique is called 'qqqqqqqq'"),
    ],
)
def test_unknown_techniques_suggest_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownTechniqueError) as caught:
        find(name)
    assert str(caught.value).startswith(message)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in message)


def test_nearest_gives_three_at_most_and_the_best_first() -> None:
    assert nearest("abcd", ["abce", "abcd-x", "abc", "xabcd", "zzzz"]) == "; did you mean xabcd, abc, abcd-x?"
    assert nearest("ABC_D", ["abc-d"]) == "; did you mean abc-d?"
    assert nearest("abcd", ["abyz", "axyz"]) == "; did you mean abyz?"  # half the letters are enough
    assert nearest("abcd", []) == ""


# What the files say


def test_files_of_a_technique(package: Path) -> None:
    kivi = dataclasses.replace(LORA, slug="2-bit-kv-cache")
    assert (LORA.module_name, LORA.module) == ("lora", "mlreviews.peft.lora")
    assert (kivi.module_name, kivi.module) == ("_2_bit_kv_cache", "mlreviews.peft._2_bit_kv_cache")
    assert kivi.reproduction == "mlreviews.reproductions.peft._2_bit_kv_cache"
    assert kivi.source_file == package / "peft" / "_2_bit_kv_cache.py"
    assert kivi.reproduction_file == package / "reproductions" / "peft" / "_2_bit_kv_cache.py"
    assert kivi.record_file == package / "reproductions" / "records" / "2-bit-kv-cache.json"
    assert kivi.test_file == package.parent.parent / "tests" / "peft" / "test__2_bit_kv_cache.py"


def test_the_state_is_that_of_the_files(package: Path) -> None:
    assert (LORA.status, LORA.implemented, LORA.tested, LORA.reproduced) == ("planned", False, False, False)
    touch(LORA.reproduction_file)
    assert (LORA.status, LORA.reproduced) == ("planned", True)
    touch(LORA.source_file)
    assert (LORA.status, LORA.implemented, LORA.tested) == ("reproduced", True, False)
    LORA.reproduction_file.unlink()
    touch(LORA.test_file)
    assert (LORA.status, LORA.tested, LORA.reproduced) == ("implemented", True, False)


def test_an_installed_package_has_no_tests(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "CHECKOUT", None)
    assert LORA.test_file is None
    assert LORA.tested is None


@pytest.mark.parametrize(
    ("source", "cores"),
    [
        ("import torch\n", ()),
        ("import mlreviews_kernels\n", ()),
        ("from mlreviews_kernels import use_backend\n", ()),
        ("from mlreviews_kernels import BackendError, use_backend\n", ()),
        ("from mlreviews_kernels.backends import select\n", ()),
        ("from mlreviews_kernels import ssd\n", ("ssd",)),
        ("from mlreviews_kernels import use_backend, ssd, attention\n", ("attention", "ssd")),
        ("from mlreviews_kernels import (\n    ssd,\n    attention,\n)\n", ("attention", "ssd")),
        ("import mlreviews_kernels.ssd\nfrom mlreviews_kernels.attention import op\n", ("attention", "ssd")),
        ("def f():\n    from mlreviews_kernels.linear_scan import op\n", ("linear_scan",)),
        ('"""Not from mlreviews_kernels import ssd."""\n# from mlreviews_kernels import ssd\n', ()),
        ("from mlreviews_kernels import ssd as core, attention  # a comment\n", ("attention", "ssd")),
        ("from mlreviews_kernels import ssd\n\n__all__ = []\n", ("ssd",)),
    ],
)
def test_kernels_are_the_imported_cores(package: Path, source: str, cores: tuple[str, ...]) -> None:
    assert LORA.kernels == ()
    touch(LORA.source_file, source)
    assert LORA.kernels == cores


def test_techniques_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LORA.slug = "dora"  # type: ignore[misc]
