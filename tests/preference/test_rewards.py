import pytest

from mlreviews.preference.rewards import brackets_balance, line_parses, line_tokenises, shortness, total_reward

# prompt, completion: parses, tokenises, brackets
CASES = [
    ("def f(w, h):\n    return w", " * h\nand more (", 1, 1, 1),
    ("", "else:\n", 1, 1, 1),
    ("    ", "elif x:\n", 1, 1, 1),
    ("", "except ValueError as e:\n", 1, 1, 1),
    ("", "except* KeyError:\n", 1, 1, 1),
    ("    t", "ry:\n", 1, 1, 1),
    ("", "try: import numpy\n", 1, 1, 1),
    ("", "finally: x = 1  # one line\n", 1, 1, 1),
    ("", "else: return\n", 1, 1, 1),
    ("    ", "elif(x):\n", 1, 1, 1),
    ("", "match x, y:\n", 1, 1, 1),
    ("", "match = 3\n", 1, 1, 1),
    ("", "case 1: return x\n", 1, 1, 1),
    ("", "async with x:\n", 1, 1, 1),
    ("", "@property\n", 1, 1, 1),
    ("", "case [a, b]:\n", 1, 1, 1),
    ("", "case = 3\n", 1, 1, 1),
    ("    ", "yield from x\n", 1, 1, 1),
    ("", "# a remark\n", 1, 1, 1),
    ("x", "\n", 1, 1, 1),
    ("a = 1\n", "\n", 0, 1, 1),  # an empty line says nothing
    ("", "foo(a,\n", 0, 1, 0),
    ("", "a)\n", 0, 1, 0),
    ("", "(a]\n", 0, 1, 0),
    ("", "x = 'abc\n", 0, 0, 1),
    ("", "x = $\n", 0, 0, 1),
    ("", "x = = 2\n", 0, 1, 1),
    ("", "try x:\n", 0, 1, 1),
    ("", "trying:\n", 0, 1, 1),
    ("", "elif\n", 0, 1, 1),
    ("", "x = 1", 0, 0, 0),  # not finished
]


@pytest.mark.parametrize(("prompt", "completion", "parses", "tokenises", "balanced"), CASES)
def test_lines(prompt: str, completion: str, parses: float, tokenises: float, balanced: float) -> None:
    found = [reward(prompt, completion) for reward in (line_parses, line_tokenises, brackets_balance)]
    assert found == [parses, tokenises, balanced]


def test_shortness_and_sums() -> None:
    short = shortness(10)
    assert [short("ignored", text) for text in ("\n", "12345\nmore", "123456789012\n")] == [1.0, 0.5, 0.0]
    both = total_reward((line_parses, 2.0), (short, -1.0))
    assert both("", "x = 1\n") == 2.0 - 0.5
    with pytest.raises(ValueError, match="limit"):
        shortness(0)
