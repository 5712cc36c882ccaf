import json
from dataclasses import replace

import pytest
import torch

from mlreviews.datasets import text_corpus
from mlreviews.models import TinyLM, TinyLMConfig, load_pretrained
from mlreviews.reproductions import pretraining
from mlreviews.reproductions.pretraining import Muon, Recipe, acceptance, distance, orthogonalised, pretrain

RECIPE = Recipe(
    TinyLMConfig(d_model=16, layers=1, heads=2, hidden=16),
    steps=6,
    batch_bytes=64,
    length=16,
    last_length=32,
    warm_up=2,
)


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch):
    documents = {f"{i}.py": f"def f{i}(x):\n    return x + {i}\n".encode() * 5 for i in range(40)}
    made = text_corpus("small", documents, "small")
    monkeypatch.setattr(pretraining, "python_source", lambda: made)
    return made


def run(recipe, out, **options):
    return [loss for _, loss in pretrain(recipe, out, **options)]


@pytest.mark.parametrize("shape", [(3, 12, 7), (2, 5, 5), (1, 4, 9)])
def test_orthogonalised_is_near_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = u @ torch.diag_embed(s.clamp(min=0.2)) @ v  # small singular values take more steps than five
    found = orthogonalised(x)
    # same singular vectors, singular values near 1
    inside = u.mT @ found @ v.mT
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), atol=1e-8, rtol=0)
    assert inside.diagonal(dim1=-2, dim2=-1).min() > 0.65
    assert inside.diagonal(dim1=-2, dim2=-1).max() < 1.25


def test_muon_by_hand() -> None:
    # a number times orthonormal columns: the direction is the same matrix times what the quintic makes of 1
    q = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    a = torch.nn.Parameter(torch.zeros(6, 3, dtype=torch.float64))
    rule = Muon([a], lr=0.1, momentum=0.5, weight_decay=0.2)
    a.grad = 5 * q
    rule.step()
    s = 3**-0.5  # singular values after division by the norm
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(a.detach(), -0.1 * 2**0.5 * s * q)
    # momentum 0.5 * 0.5 * 5q + 0.5 * -7q points the other way, and Nesterov's step further; decay is decoupled
    before = a.detach().clone()
    a.grad = -7 * q
    rule.step()
    torch.testing.assert_close(a.detach(), before * (1 - 0.1 * 0.2) + 0.1 * 2**0.5 * s * q)
    a.grad = None
    rule.step()  # no gradient, no change
    torch.testing.assert_close(a.detach(), before * (1 - 0.1 * 0.2) + 0.1 * 2**0.5 * s * q)
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_rate_rises_stays_and_falls() -> None:
    recipe = replace(RECIPE, steps=100, warm_up=10, last=0.2)
    assert [recipe.rate(step) for step in (0, 4, 9, 50, 79, 80, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 1, 0.5, 0.05]
    )
    assert [recipe.in_last_part(step) for step in (0, 79, 80, 99)] == [False, False, True, True]


def test_a_run_that_goes_on_equals_one_that_was_not_cut(tmp_path, corpus, monkeypatch) -> None:
    whole = run(RECIPE, tmp_path / "whole", split=corpus.train)
    assert len(whole) == 6
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
    steps = pretrain(RECIPE, tmp_path / "cut", split=corpus.train)
    for _ in range(5):
        next(steps)
    steps.close()  # killed after step 5; the checkpoint is from step 4
    assert len(run(RECIPE, tmp_path / "cut", split=corpus.train)) == 2
    a, b = (TinyLM.load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="another recipe"):
        run(replace(RECIPE, seed=1), tmp_path / "cut", split=corpus.train)


def test_record_and_rounded_weights(tmp_path, corpus) -> None:
    losses = run(RECIPE, tmp_path, split=corpus.train)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["loss_curve"]["values"] == pytest.approx([sum(losses) / 6], abs=1e-3)
    assert record["bytes_of_text"] == 6 * 64
    model = load_pretrained(str(tmp_path))
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())
    window = torch.cat([w.flatten() for w in corpus.validation.sweep(len(corpus.validation.data), 1)])[None]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:])
    # measured in windows of 32, which see less than the whole text does
    assert record["validation_bits_per_byte"] == pytest.approx(float(loss) / 0.6931, abs=0.3)


def test_a_teacher_is_followed_in_the_last_part(tmp_path, corpus) -> None:
    recipe = replace(RECIPE, steps=60, last=0.9, warm_up=5)
    teacher = TinyLM(recipe.config, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4)

    def far(name: str) -> float:
        ids = next(corpus.validation.batches(32, 8, torch.Generator().manual_seed(3)))
        with torch.no_grad():
            p, q = (m(ids).logits.log_softmax(-1) for m in (teacher, TinyLM.load(tmp_path / name)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    run(recipe, tmp_path / "with", split=corpus.train, teacher=teacher)
    run(recipe, tmp_path / "without", split=corpus.train)
    assert far("with") < 0.7 * far("without")


def test_distance_is_1_less_the_acceptance() -> None:
    p, q = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[0.1, 0.6, 0.3], [1.0, 0.0, 0.0]]])
    # sum min(p, q): 0.1 + 0.5 at the first place, 0.2 at the second
    assert float(distance(q.log()[None], p.log()[None])) == pytest.approx(1 - (0.6 + 0.2) / 2)


def test_a_second_stage_goes_on_and_brings_the_draft_nearer(tmp_path, corpus) -> None:
    run(RECIPE, tmp_path / "first", split=corpus.train)
    untouched = replace(RECIPE, steps=1, muon_rate=0.0, adam_rate=0.0)
    run(untouched, tmp_path / "same", split=corpus.train, start=tmp_path / "first")
    a, b = (TinyLM.load(tmp_path / name).state_dict() for name in ("first", "same"))
    assert all(torch.equal(a[name], b[name]) for name in a)

    teacher = TinyLM(RECIPE.config, generator=torch.Generator().manual_seed(9)).requires_grad_(False)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4)
    recipe = replace(RECIPE, steps=40, last=1.0, distance=1.0)
    run(recipe, tmp_path / "second", split=corpus.train, teacher=teacher, start=tmp_path / "first")
    record = json.loads((tmp_path / "second" / "training.json").read_text())
    assert record["first_stage"] == json.loads((tmp_path / "first" / "training.json").read_text())
    assert record["acceptance"]["temperature_1"] > record["acceptance_before"]["temperature_1"] + 0.02
    found = acceptance(TinyLM.load(tmp_path / "second"), teacher, corpus.validation, recipe.last_length)
    assert found == record["acceptance"]
