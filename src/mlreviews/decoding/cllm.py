r"""CLLM: a language model trained to reach the end of Jacobi's iteration in fewer steps.

Paper: CLLMs: Consistency Large Language Models (arXiv:2403.00835).

Jacobi decoding guesses a block of tokens and corrects all of them at once, until nothing changes. A model that was
trained to predict the next token corrects hardly more than one token a step, since it has never seen a wrong past.
Here it is trained on the steps that it took itself: from any of them it shall say what it says at the end. A usual
language-model loss on the end keeps it what it was. Decoding is as before, with fewer steps.

Equation:
    $$ L_{\mathrm{global}} = \frac{1}{n} \sum_{i=1}^{n} \mathrm{KL}\big(q_{\theta^-}(\cdot \mid y^*_{<i}, x)
       \,\|\, q_\theta(\cdot \mid y^{(j)}_{<i}, x)\big) \tag{1} $$
    $$ L_{\mathrm{local}} = \frac{1}{n} \sum_{i=1}^{n} \mathrm{KL}\big(q_{\theta^-}(\cdot \mid y^{(j+1)}_{<i}, x)
       \,\|\, q_\theta(\cdot \mid y^{(j)}_{<i}, x)\big) \tag{2} $$
    $$ L = L_{\mathrm{global}} + w\, L_{\mathrm{AR}}, \qquad
       L_{\mathrm{AR}} = -\frac{1}{n} \sum_{i=1}^{n} \log q_\theta(y^*_i \mid y^*_{<i}, x) \tag{3} $$

Symbols:
    x: [batch, time], prompts.
    y: [iterations, batch, n], the block in each step; y^(0) is the first guess, y* the last, which no step changes.
    q: the model's distribution of the next token; with the minus sign its gradient is stopped.
    w: weight of the loss on the end.

Defaults:
    n: 16 tokens (the paper trains with 16 to 256).
    ar_weight: 10 (the authors' code).
    loss: global, which the paper finds to be better than local.

Deviations:
    1. Means over the tokens, where the paper's equations sum and the authors' code takes the mean of those tokens that
       come after the first wrong one. Those before have no divergence.
    2. The divergence is the forward one, as the authors' soft cross-entropy is up to the teacher's entropy.
    3. The loss on the end is the plain cross-entropy; the authors' code smooths its labels by 0.1.
    4. Answers that repeat themselves or end early are not filtered here.

Reduces to:
    next-token training: without the consistency loss, `autoregressive_loss` is the cross-entropy on y*.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number
from mlreviews.decoding.jacobi_decoding import jacobi_solve
from mlreviews.models import CausalLM, check_prompt

__all__ = ["autoregressive_loss", "cllm_loss", "collect_jacobi_trajectory", "consistency_loss"]


@torch.no_grad()
def collect_jacobi_trajectory(
    model: CausalLM,
    prompt: Int[Tensor, "batch time"],
    n: int = 16,
    *,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "states batch n"]:
    """All that greedy Jacobi decoding of a block goes through, for a batch until its last row stands still.

    Args:
        model: any `mlreviews.models.CausalLM`.
        prompt: [batch, time], int64.
        n: tokens of the block.
        generator: draws the first guess from the tokens of the prompt; None is the global one.

    Returns:
        [states, batch, n], the first guess first and the greedy continuation last. There is one state more than
        iterations were needed.

    Raises:
        ValueError: n below 1, an empty prompt, ids outside the vocabulary, more tokens than the model can see.
        TypeError: ids are not int64.
    """
    check_count("n", n)
    check_prompt(model, prompt, n)
    place = torch.randint(prompt.shape[1], (len(prompt), n), generator=generator, device=prompt.device)
    states = [prompt.gather(1, place)]
    before = model(prompt[:, :-1]).cache if prompt.shape[1] > 1 else None

    def step(y: Tensor) -> Tensor:
        said: Tensor = model(torch.cat([prompt[:, -1:], y[:, :-1]], 1), before).logits.argmax(-1)
        if not torch.equal(said, y):
            states.append(said)
        return said

    jacobi_solve(step, states[0])
    return torch.stack(states)


def consistency_loss(
    model: CausalLM,
    prompt: Int[Tensor, "batch time"],
    state: Int[Tensor, "batch n"],
    wanted: Int[Tensor, "batch n"],
) -> Float[Tensor, ""]:
    """Equation (1) or (2), mean over the batch: after one state the model shall say what it says after another.

    Args:
        model: is trained on `state`, and judges `wanted` without a gradient.
        prompt: [batch, time].
        state: [batch, n], of a trajectory.
        wanted: [batch, n], the end of that trajectory (global), or its next state (local).
    """
    _check(state, wanted)
    with torch.no_grad():
        teacher = _log_probs(model, prompt, wanted)
    student = _log_probs(model, prompt, state)
    return nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()


def autoregressive_loss(
    model: CausalLM, prompt: Int[Tensor, "batch time"], y: Int[Tensor, "batch n"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of a block's tokens after the prompt, each with the right tokens before it, in nats.

    Args:
        model: is trained.
        prompt: [batch, time].
        y: [batch, n].
    """
    return -_log_probs(model, prompt, y).gather(2, y[..., None]).mean()


def cllm_loss(
    model: CausalLM,
    prompt: Int[Tensor, "batch time"],
    state: Int[Tensor, "batch n"],
    fixed: Int[Tensor, "batch n"],
    *,
    ar_weight: float = 10.0,
) -> Float[Tensor, ""]:
    """Equation (3).

    Args:
        model: is trained.
        prompt: [batch, time].
        state: [batch, n], any state of a trajectory.
        fixed: [batch, n], its last state.
        ar_weight: w, 0 or more.

    Raises:
        ValueError: shapes that differ, or a negative weight.
    """
    check_number("ar_weight", ar_weight, least=0.0)
    return consistency_loss(model, prompt, state, fixed) + ar_weight * autoregressive_loss(model, prompt, fixed)


def _log_probs(model: CausalLM, prompt: Tensor, y: Tensor) -> Tensor:
    """[batch, n, vocab], of each token of the block given those before it."""
    logits = model(torch.cat([prompt, y[:, :-1]], 1)).logits[:, prompt.shape[1] - 1 :]
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _check(state: Tensor, wanted: Tensor) -> None:
    if state.shape != wanted.shape:
        raise ValueError(f"state: expected {list(wanted.shape)}, as the other one has, got {list(state.shape)}")
