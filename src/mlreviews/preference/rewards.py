"""Rewards that can be verified without a judge or a network: is the line that a model wrote Python?

Each is a function of the prompt and of what the model wrote after it, both as text, and returns a number. The line they
look at is what the prompt left unfinished together with the completion up to its first line break::

    reward = line_parses("def area(w, h):\\n    return w", " * h\\n")     # 1.0
"""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize
import warnings
from collections.abc import Callable

__all__ = ["brackets_balance", "line_parses", "line_tokenises", "shortness", "total_reward"]

Reward = Callable[[str, str], float]

_PAIRS = {")": "(", "]": "[", "}": "{"}
# What makes a line that only continues a statement a whole one.
_BEFORE = {"elif": "if x:\n pass\n", "else": "if x:\n pass\n", "except": "try:\n pass\n", "finally": "try:\n pass\n"}


def completed_line(prompt: str, completion: str) -> str:
    """The line that the completion finishes: what follows the prompt's last line break, up to the next one."""
    return prompt.rpartition("\n")[2] + completion.partition("\n")[0]


def is_finished(completion: str) -> bool:
    """Whether the completion has a line break, so that its line is whole."""
    return "\n" in completion


def line_tokenises(prompt: str, completion: str) -> float:
    """1 where the completed line consists of Python's tokens (an open bracket may stay open), else 0."""
    if not is_finished(completion):
        return 0.0
    line = completed_line(prompt, completion).strip()
    try:
        for token in tokenize.generate_tokens(io.StringIO(line + "\n").readline):
            if token.type == tokenize.ERRORTOKEN:
                return 0.0
    except tokenize.TokenError as error:
        return 1.0 if "multi-line statement" in str(error) else 0.0
    except SyntaxError:
        return 0.0
    return 1.0


def line_parses(prompt: str, completion: str) -> float:
    """1 where the completed line is a statement of Python, or the head of one such as ``if x:``, and not empty, else 0.

    Its surroundings are not looked at: ``return x`` and ``else:`` are fine, the first line of a longer call is not.
    """
    if not is_finished(completion):
        return 0.0
    line = textwrap.dedent(completed_line(prompt, completion)).rstrip()
    if not line or line.lstrip().startswith("#"):
        return float(bool(line))
    candidates = [line, f"{line}\n pass", f"{line}\ndef f(): pass"]  # the last one for decorators
    first = line.partition(" ")[0].partition(":")[0]
    if first in _BEFORE:
        candidates.append(f"{_BEFORE[first]}{line}\n pass")
    if first == "case":
        candidates.append(f"match x:\n {line}\n  pass")
    return float(any(map(_parses, candidates)))


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def brackets_balance(prompt: str, completion: str) -> float:
    """1 where round, square and curly brackets of the completed line are balanced, else 0. Strings are not looked into.

    A line that is not finished gets 0.
    """
    if not is_finished(completion):
        return 0.0
    open_ones: list[str] = []
    for character in completed_line(prompt, completion):
        if character in _PAIRS.values():
            open_ones.append(character)
        elif character in _PAIRS and (not open_ones or open_ones.pop() != _PAIRS[character]):
            return 0.0
    return float(not open_ones)


def shortness(limit: int) -> Reward:
    """A reward of 1 for an empty completion that falls linearly to 0 at the given number of characters.

    Args:
        limit: characters, at least 1.

    Raises:
        ValueError: a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    return lambda prompt, completion: max(0.0, 1 - len(completion.partition("\n")[0]) / limit)


def total_reward(*weighted: tuple[Reward, float]) -> Reward:
    """The weighted sum of several rewards, as one reward.

    Args:
        *weighted: pairs of a reward and its weight.
    """
    return lambda prompt, completion: sum(weight * reward(prompt, completion) for reward, weight in weighted)
