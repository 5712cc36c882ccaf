"""Rewards that can be verified without a judge or a network: is the line that a model wrote Python?

Each is a function of the prompt and of what the model wrote after it, both as text, and returns a number. The line they
look at is what the prompt left unfinished together with the completion up to its first line break::

    reward = line_parses("def area(w, h):\\n    return w", " * h\\n")     # 1.0
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
import warnings
from collections.abc import Callable

__all__ = ["brackets_balance", "line_parses", "line_tokenises", "shortness", "total_reward"]

Reward = Callable[[str, str], float]

_PAIRS = {")": "(", "]": "[", "}": "{"}
# What stands before and after a line that is only a part of a statement, by its first word.
_AROUND = {
    "elif": ("if x:\n pass\n", ""),
    "else": ("if x:\n pass\n", ""),
    "try": ("", "\nfinally:\n pass"),
    "except": ("try:\n pass\n", ""),
    "finally": ("try:\n pass\n", ""),
    "match": ("", "\n case x:\n  pass"),
    "case": ("match x:\n ", ""),
    "@": ("", "\ndef f(): pass"),
}


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
    except (tokenize.TokenError, SyntaxError) as error:
        return float("multi-line statement" in str(error))
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
    before, after = _AROUND.get(re.findall(r"^@|^\w*", line)[0], ("", ""))
    return float(any(_parses(text) for text in (line, before + line + after, f"{before}{line}\n  pass{after}")))


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
