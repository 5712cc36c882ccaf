from __future__ import annotations

import copy
import math

import pytest
import torch

from mlreviews.datasets import TextSplit, text_corpus
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference.rewards import line_parses
from mlreviews.reproductions.completed_lines import LONGEST, independent, line_prompts, practise, skill


@pytest.fixture(scope="module")
def split() -> TextSplit:
    text = '"""Text that is prose,\nno code at all (."""\n# a remark\n' + "\n".join(
        f"def name_{i}(x):\n    return x + {i}\n\ntable = [\n    {i},\n]" for i in range(40)
    )
    documents = {f"{i}.py": (text + "\nnaïve = 'é'\n" * 9).encode() for i in range(20)}
    return text_corpus("small", documents, "small").train


@pytest.fixture
def model() -> TinyLM:
    return TinyLM(TinyLMConfig(d_model=16, layers=1, heads=2, hidden=16), generator=torch.Generator().manual_seed(0))


def test_prompts_end_within_lines_that_parse(split: TextSplit) -> None:
    prompts = line_prompts(split, 60, seed=0)
    assert prompts == line_prompts(split, 60, seed=0) != line_prompts(split, 60, seed=1)
    text = split.document(split.files[0]).decode()
    for prompt in prompts:
        assert len(prompt) == 48
        assert prompt.isascii()
        line = prompt.rpartition("\n")[2].strip()
        assert line
        assert not line.startswith("#")
        places = [i + 48 for i in range(len(text)) if text.startswith(prompt, i)]
        rests = [text[i:].partition("\n")[0] + "\n" for i in places]
        assert any(len(rest) <= LONGEST and line_parses(prompt, rest) == 1 for rest in rests)


def test_skill_is_that_of_the_answers(split: TextSplit, model: TinyLM) -> None:
    prompts = line_prompts(split, 10, seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all ids are equally likely: log2(259) bits, and hardly an answer ends
    found = skill(model, prompts, split, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.bits, torch.full((16,), math.log2(259)))
    assert found.lengths.max() <= LONGEST
    assert found.parses.shape == found.lengths.shape == (10,)

    class Newline(TinyLM):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            logits = torch.full_like(out.logits, -50.0)
            logits[..., 10] = 50
            return out._replace(logits=logits)

    ends = Newline(model.config)
    found = skill(ends, ["x = 1", "def f(", "return y  # as"], split, torch.Generator().manual_seed(0))
    assert found.parses.tolist() == [1, 0, 1]  # prompts of different lengths, left as they are
    assert found.lengths.tolist() == [0, 0, 0]


def test_practice_raises_the_reward(model: TinyLM) -> None:
    def reward(prompt: str, answer: str) -> float:
        return float(answer[:1].isascii() and answer[:1] < "@")

    def trained(steps: int) -> tuple[TinyLM, list[float]]:
        policy, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        return policy, practise(
            policy, ["ab", "cde"], reward, steps=steps, rate=0.2, batch=2, group_size=8, generator=generator
        )

    _, rewards = trained(10)
    assert len(rewards) == 10
    assert sum(rewards[:3]) / 3 < 0.5  # a quarter of all ids
    assert sum(rewards[-3:]) / 3 > 0.8
    (policy, first), (again, _) = trained(2), trained(2)
    assert first == rewards[:2]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_what_counts_as_independent() -> None:
    change = torch.arange(8.0)
    assert independent([change], groups=4) == [0.5, 2.5, 4.5, 6.5]
    assert independent([change, change + 1, change + 2], groups=4) == [3.5, 4.5, 5.5]
