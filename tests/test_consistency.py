"""The catalogue, the modules, their cards, tests and reproductions say the same thing."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

from mlreviews.catalogue import CHECKOUT, KINDS, PACKAGE, Technique, areas, techniques
from mlreviews.catalogue.card import public_names, read_card
from mlreviews.reproductions.protocol import Record

IMPLEMENTED = [t for t in techniques().values() if t.implemented]
REPRODUCED = [t for t in techniques().values() if t.reproduced]
each_implemented = pytest.mark.parametrize("technique", IMPLEMENTED, ids=lambda t: t.slug)
each_reproduced = pytest.mark.parametrize("technique", REPRODUCED, ids=lambda t: t.slug)

# Each layer may import those before it (DESIGN: kernels <- models <- areas <- reproductions <- command line).
SHARED = {"catalogue", "common", "datasets", "models"}


def _modules(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.py") if p.name != "__init__.py")


def _imports(source: Path) -> set[str]:
    """Dotted names of everything the file imports, at whatever depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import, line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _layers(source: Path) -> set[str]:
    """The direct sub-packages of mlreviews that the file imports from."""
    return {name.split(".")[1] for name in _imports(source) if name.startswith("mlreviews.")}


def test_the_catalogue_is_whole() -> None:
    assert len(techniques()) == 325
    assert len(areas()) == 24
    assert Counter(t.kind for t in techniques().values()) == dict(zip(KINDS, (212, 63, 50), strict=True))


def test_no_module_without_a_catalogue_row() -> None:
    known = {t.source_file for t in techniques().values()} | {t.reproduction_file for t in techniques().values()}
    known |= _helpers()
    found = [f for area in areas() for root in (PACKAGE, PACKAGE / "reproductions") for f in _modules(root / area)]
    assert [str(f.relative_to(PACKAGE)) for f in found if f not in known] == []


def _helpers() -> set[Path]:
    """Modules of an area that are no technique, but that two techniques of it need."""
    users = Counter(name for t in IMPLEMENTED for name in {n.rpartition(".")[0] for n in _imports(t.source_file)})
    modules = {f"mlreviews.{area}.{f.stem}": f for area in areas() for f in _modules(PACKAGE / area)}
    return {f for name, f in modules.items() if users[name] >= 2} - {t.source_file for t in techniques().values()}


def test_no_package_that_is_neither_an_area_nor_shared() -> None:
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages <= areas().keys() | SHARED | {"cli", "reproductions"}


@each_implemented
def test_card_is_complete_and_cites_the_paper(technique: Technique) -> None:
    card = read_card(technique.source_file)
    if technique.arxiv:
        assert f"arXiv:{technique.arxiv}" in " ".join(card.sources)


@each_implemented
def test_reductions_name_known_techniques_and_are_tested(technique: Technique) -> None:
    reductions = read_card(technique.source_file).reductions
    for target in reductions:
        # "torch.nn.Linear" or "ridge regression" is none of ours; a lone word or a slug must be in the catalogue.
        assert target in techniques() or re.search(r"[. ]", target), f"unknown technique {target!r}"
    assert technique.test_file is not None
    tested = re.findall(r"def test_\w*reduces_to\w*", technique.test_file.read_text(encoding="utf-8"))
    assert len(tested) >= len(reductions), f"{len(reductions)} reductions, but {len(tested)} tests named reduces_to"


@each_implemented
def test_has_its_own_tests(technique: Technique) -> None:
    assert technique.tested, f"{technique.slug}: {technique.test_file} does not exist"


def test_no_test_file_without_a_module() -> None:
    assert CHECKOUT is not None
    known = {t.test_file for t in IMPLEMENTED}
    known |= {CHECKOUT / "tests" / f.parent.name / f"test_{f.name}" for f in _helpers()}
    found = [f for area in areas() for f in (CHECKOUT / "tests" / area).glob("test_*.py")]
    assert [f.name for f in found if f not in known] == []


@each_implemented
def test_public_names_are_exported_by_the_area_and_documented(technique: Technique) -> None:
    module = importlib.import_module(technique.module)
    area = importlib.import_module(f"mlreviews.{technique.area}")
    assert module.__all__, "the module has no __all__"
    for name in module.__all__:
        thing = getattr(module, name)
        assert getattr(area, name, None) is thing, f"{name} is not what mlreviews.{technique.area} exports"
        assert inspect.getdoc(thing), f"{name} has no docstring"
        if inspect.isfunction(thing) or (inspect.isclass(thing) and not getattr(thing, "_is_protocol", False)):
            _assert_arguments_documented(thing)
    # What the command line and the site read from the source is what the module really has.
    assert [public.name for public in public_names(technique.source_file)] == list(module.__all__)


def _assert_arguments_documented(thing: type | object) -> None:
    text = inspect.getdoc(thing) or ""
    for name, parameter in inspect.signature(thing).parameters.items():  # type: ignore[arg-type]
        stars = {parameter.VAR_POSITIONAL: r"\*", parameter.VAR_KEYWORD: r"\*\*"}.get(parameter.kind, "")
        assert re.search(rf"^\s*{stars}{name}\b.*:", text, re.MULTILINE), f"{thing}: {name} is not documented"


@pytest.mark.parametrize("area", [a for a in areas() if (PACKAGE / a).is_dir()])
def test_public_names_are_unique_within_an_area(area: str) -> None:
    names = Counter(public.name for t in areas()[area] if t.implemented for public in public_names(t.source_file))
    assert [name for name, count in names.items() if count > 1] == []


@each_implemented
def test_areas_do_not_import_each_other(technique: Technique) -> None:
    assert _layers(technique.source_file) <= SHARED | {technique.area}
    assert not any(name.startswith("triton") for name in _imports(technique.source_file))


@pytest.mark.parametrize("package", sorted(SHARED))
def test_what_is_shared_imports_no_area(package: str) -> None:
    for source in (PACKAGE / package).glob("*.py"):
        # The catalogue reads the modules' sources; its table for the README draws on nothing else either.
        assert _layers(source) <= SHARED, source


@each_reproduced
def test_reproduction_is_whole_and_has_a_record(technique: Technique) -> None:
    assert technique.implemented
    module = importlib.import_module(technique.reproduction)
    assert list(inspect.signature(module.run).parameters) == ["settings"]
    assert list(inspect.signature(module.draw).parameters) == ["outcome"]
    record = Record.read(PACKAGE / "reproductions" / "records" / f"{technique.slug}.json")
    assert record.slug == technique.slug
    assert record.outcome.claims
    assert module.draw(record.outcome).axes, "the figure is empty"


def test_no_record_without_a_reproduction() -> None:
    found = {path.stem for path in (PACKAGE / "reproductions" / "records").glob("*.json")}
    assert found <= {t.slug for t in REPRODUCED}
