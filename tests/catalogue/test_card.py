from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mlreviews.catalogue.card import (
    SECTIONS,
    Card,
    CardError,
    PublicName,
    entries,
    parse_card,
    public_names,
    read_card,
)

CARD = r"""LoRA: a low-rank update beside each weight matrix.

Paper: LoRA: Low-Rank Adaptation of Large
    Language Models (arXiv:2106.09685)
Paper: A second one (arXiv:2401.00001)
Source: https://example.org/notes

The weights stay as they are.
Two small matrices are trained.

They start at zero: nothing changes at first.

Equation:
    $$ y = W x + \frac{\alpha}{r} B A x \tag{1} $$

    Note: this is eq. 3 of the paper.

Symbols:
    x: [batch, in_features], the input.
    A: [rank, in_features], the down projection,
        small random numbers at first.

Defaults:
    rank: 8 (table 1).

Deviations:
    None.

Reduces to:
    torch.nn.Linear: with B = 0.
    dora: with a frozen magnitude: exactly
      that.
"""


def without(section: str) -> str:
    """The card without one of its sections."""
    start = CARD.index(f"\n{section}:")
    end = CARD.find("\n\n", start)
    return CARD[:start] + (CARD[end:] if end > 0 else "\n")


def test_reading_cards_loads_no_torch() -> None:
    code = "import sys, mlreviews.catalogue.card; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_the_parts_of_a_card() -> None:
    card = parse_card(CARD)
    assert card.title == "LoRA: a low-rank update beside each weight matrix."
    assert card.sources == (
        "LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685)",
        "A second one (arXiv:2401.00001)",
        "https://example.org/notes",
    )
    assert card.description == (
        "The weights stay as they are.\nTwo small matrices are trained.\n\n"
        "They start at zero: nothing changes at first."
    )
    assert tuple(card.sections) == SECTIONS
    assert card.sections["Equation"] == (
        "$$ y = W x + \\frac{\\alpha}{r} B A x \\tag{1} $$\n\nNote: this is eq. 3 of the paper."
    )
    assert card.sections["Symbols"].splitlines()[2] == "    small random numbers at first."
    assert card.reductions == {"torch.nn.Linear": "with B = 0.", "dora": "with a frozen magnitude: exactly that."}


def test_a_card_can_not_be_changed() -> None:
    for made in (parse_card(CARD), PublicName("f", "f()", "")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, dataclasses.fields(made)[0].name, "")


@pytest.mark.parametrize("nothing", ["none.", "None.", "none", "NONE"])
def test_nothing_is_said_with_a_word(nothing: str) -> None:
    card = parse_card(CARD.replace("None.", nothing))
    assert card.is_none("Deviations")
    assert not card.is_none("Defaults")
    start = CARD.index("    torch.nn.Linear")
    assert parse_card(CARD[:start] + f"    {nothing}\n").reductions == {}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_section_is_named(section: str) -> None:
    with pytest.raises(CardError, match=f"the card has no section '{section}:' with an indented text below it"):
        parse_card(without(section))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Defaults:\n    rank", "Defaults:\nrank", "no section 'Defaults:'"),
        ("Defaults:\n    rank: 8 (table 1).\n", "Defaults:\n", "no section 'Defaults:'"),
        ("Deviations:", "Derivations:", "no section 'Deviations:'"),
        ("Reduces to:", "Notes:\n    Much.\n\nReduces to:", "unknown section 'Notes:'; the sections are Equation, Sym"),
        ("Deviations:", "Defaults:\n    rank: 9.\n\nDeviations:", "two sections 'Defaults:'"),
        ("Paper: A", "Papers: A", r"'Papers: A second one .*' stands among the 'Paper:' and 'Source:' lines"),
        ("each weight matrix.", "each weight matrix", "a first line that ends with a full stop"),
        ("\nDefaults:", "And this.\n\nDefaults:", r"'And this\.' is not indented, .* section 'Symbols:'"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert CARD.count(old) == 1
    with pytest.raises(CardError, match=message):
        parse_card(CARD.replace(old, new))


def test_a_card_needs_a_source_and_a_description() -> None:
    head, _, sections = CARD.partition("\nEquation:")
    title, *paragraphs = head.split("\n\n")
    with pytest.raises(CardError, match="the card names no 'Paper:' or 'Source:'"):
        parse_card("\n\n".join([title, *paragraphs[1:]]) + "\nEquation:" + sections)
    with pytest.raises(CardError, match="and a description"):
        parse_card("\n\n".join([title, paragraphs[0]]) + "\n\nEquation:" + sections)
    with pytest.raises(CardError):
        parse_card("")


def test_entries() -> None:
    assert entries("a: one\n  more\n\nb, c: two: three\nd: x\n\teven more  ") == {
        "a": "one more",
        "b, c": "two: three",
        "d": "x even more",
    }
    assert entries("") == {}
    with pytest.raises(CardError, match="expected 'name: text', got 'no colon'"):
        entries("a: one\nno colon")
    with pytest.raises(CardError, match="expected 'name: text', got ' indented first'"):
        entries(" indented first")


def test_the_file_of_a_broken_card_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lora.py"
    path.write_text(f'r"""{CARD}"""\nimport torch\n', encoding="utf-8")
    assert read_card(path) == parse_card(CARD)
    path.write_text('"""LoRA."""\n', encoding="utf-8")
    with pytest.raises(CardError, match=r"^lora\.py: the card has no section 'Equation:'"):
        read_card(path)
    path.write_text("import torch\n", encoding="utf-8")
    with pytest.raises(CardError, match=r"^lora\.py: "):
        read_card(path)
    path.write_text('"""LoRA."""\ndef f(:\n', encoding="utf-8")
    with pytest.raises(CardError, match=r"^lora\.py: line 2: "):
        read_card(path)


MODULE = '''
"""A module."""
from dataclasses import dataclass
from torch import Tensor, nn

__all__ = ["scale", "Layer", "Plain", "Point", "RANK", "Tensor", "missing"]
RANK = 8


def scale(x: Float[Tensor, "n d"], *, factor: float = 2.0, generator: torch.Generator | None = None) -> Tensor:
    """Multiplies.

    Args:
        x: a tensor.
    """


class Layer(nn.Module):
    """A layer.

    More.
    """

    def forward(self, x):
        """Not the constructor."""

    def __init__(self, width: int, *, bias=True) -> None:
        """Not the class."""


class Plain:
    def method(self): ...


class Lonely:
    """Is not exported."""

    def __init__(self) -> None: ...


@dataclass(frozen=True)
class Point:
    """A point."""

    x: float
    y: float = 0.0
'''


def test_public_names(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE, encoding="utf-8")
    generator = "generator: torch.Generator | None=None"
    assert public_names(path) == [
        PublicName(
            "scale", f"scale(x: Float[Tensor, 'n d'], *, factor: float=2.0, {generator}) -> Tensor", "Multiplies."
        ),
        PublicName("Layer", "class Layer(width: int, *, bias=True)", "A layer."),
        PublicName("Plain", "class Plain()", ""),
        PublicName("Point", "class Point(x: float, y: float = 0.0)", "A point."),
        PublicName("RANK", "RANK", ""),
        PublicName("Tensor", "Tensor", ""),
        PublicName("missing", "missing", ""),
    ]


def test_a_constructor_without_arguments(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE.replace('"missing"', '"Lonely"'), encoding="utf-8")
    assert public_names(path)[-1] == PublicName("Lonely", "class Lonely()", "Is not exported.")


@pytest.mark.parametrize("source", ["", "x = 1\n", "a, b = 1, 2\n"])
def test_a_module_that_exports_nothing(tmp_path: Path, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    assert public_names(path) == []


def test_cards_are_compared_by_what_they_say() -> None:
    card = parse_card(CARD)
    assert card == Card(card.title, card.sources, card.description, card.sections)
