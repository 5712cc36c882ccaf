"""Does the clip let one batch serve for ten epochs, and does it do better than no clip and than a KL penalty?

Random Markov decision processes (15 states, 4 actions) with tables for policy and values, so that every policy's return
is known exactly. All methods see the same number of steps; each has its best of three learning rates.
Quick: 24 processes, 30 batches. Full: 30 processes, 100 batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlreviews.preference.ppo import adapt_kl_coefficient, categorical_kl, gae, ppo_clip_loss, ppo_kl_loss, value_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:1707.06347"
STATES, ACTIONS, ENVS, STEPS, GAMMA = 15, 4, 8, 32, 0.95
RATES = (0.03, 0.1, 0.3)
METHODS = ("clip 0.2, 10 epochs", "no clip, 10 epochs", "adaptive KL, 10 epochs", "1 epoch")


class _Process(NamedTuple):
    """One decision process per run: transitions [runs, states, actions, states] and rewards [runs, states, actions]."""

    transitions: Tensor
    rewards: Tensor


class _Batch(NamedTuple):
    states: Tensor  # [runs, envs, steps + 1]
    actions: Tensor  # [runs, envs, steps]


def run(settings: Settings) -> Outcome:
    """Trains all methods on the same processes and compares exact returns."""
    runs, batches = (30, 100) if settings.full else (24, 30)
    process = _processes(runs, settings.generator())
    curves, divergence, best = {}, {}, {}
    for method in settings.track(METHODS, "methods"):
        scores, divergence[method] = _train(method, process, batches, settings.generator(1))
        best[method] = int(scores.mean((1, 2)).argmax())
        curves[method] = scores[best[method]]
    clip, free, penalty, single = (curves[method].mean(1) for method in METHODS)
    rate = best[METHODS[0]]
    average = f"{PAPER}, table 1 (measured over the whole training, as table 2 does)"
    claims = [
        measure(
            "Ten epochs with the clip do better than ten without it (difference in normalised return)",
            average,
            (clip - free).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and than ten with an adaptive KL penalty of target 0.01 (difference)",
            average,
            (clip - penalty).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and than a single epoch on the same samples (difference)",
            f"{PAPER}, section 5",
            (clip - single).tolist(),
            at_least=0.0,
        ),
        measure(
            "The clip holds the policy back in each batch (KL without it / with it, same learning rate)",
            f"{PAPER}, section 3",
            (divergence[METHODS[1]][rate] / divergence[METHODS[0]][rate]).tolist(),
            at_least=1.0,
            unit="times",
        ),
    ]
    series = {"batches": [float(i) for i in range(batches + 1)]}
    series |= {method: curves[method].mean(0).tolist() for method in METHODS}
    return Outcome(claims, series)


def _processes(runs: int, generator: torch.Generator) -> _Process:
    """Garnet processes: three possible successors of every state and action."""
    transitions = torch.zeros(runs, STATES, ACTIONS, STATES)
    chances = torch.rand(runs, STATES, ACTIONS, STATES, generator=generator)
    successors = chances.topk(3, dim=-1).indices
    weights = torch.rand(runs, STATES, ACTIONS, 3, generator=generator) + 0.1
    transitions.scatter_(-1, successors, weights / weights.sum(-1, keepdim=True))
    return _Process(transitions, torch.randn(runs, STATES, ACTIONS, generator=generator))


def _train(method: str, process: _Process, batches: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normalised returns [rates, runs, batches + 1], and the mean KL of a batch [rates, runs]."""
    runs = len(process.rewards)
    wide = _Process(*(x.repeat(len(RATES), *[1] * (x.ndim - 1)) for x in process))
    logits = [torch.zeros(runs, STATES, ACTIONS, requires_grad=True) for _ in RATES]
    values = [torch.zeros(runs, STATES, requires_grad=True) for _ in RATES]
    optimiser = torch.optim.Adam(
        [{"params": [p, v], "lr": rate} for p, v, rate in zip(logits, values, RATES, strict=True)]
    )
    lowest, highest = _return(wide, torch.zeros(len(RATES) * runs, STATES, ACTIONS)), _best(wide)
    betas = [1.0] * (len(RATES) * runs)
    scores, moved = [], []
    for _ in range(batches):
        old = torch.cat(logits).detach()
        scores.append((_return(wide, old) - lowest) / (highest - lowest))
        loss = _surrogate(method, wide, old, torch.cat(values).detach(), generator)
        for _ in range(1 if method == METHODS[3] else 10):
            optimiser.zero_grad()
            loss(torch.cat(logits), torch.cat(values), torch.tensor(betas)).backward()
            optimiser.step()
        kl = categorical_kl(old, torch.cat(logits).detach()).mean(1)
        betas = [adapt_kl_coefficient(b, float(k), 0.01) for b, k in zip(betas, kl, strict=True)]
        moved.append(kl)
    scores.append((_return(wide, torch.cat(logits).detach()) - lowest) / (highest - lowest))
    shape = (len(RATES), runs)
    return torch.stack(scores, 1).view(*shape, -1), torch.stack(moved, 1).mean(1).view(shape)


def _surrogate(
    method: str, process: _Process, old: Tensor, old_values: Tensor, generator: torch.Generator
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Draws a batch with the old policy; returns the loss of that batch as a function of logits, values and betas."""
    batch = _rollout(process, old, generator)
    runs = torch.arange(len(old))[:, None, None]
    states, actions = batch.states[..., :-1], batch.actions
    rewards = process.rewards[runs, states, actions].flatten(0, 1)
    seen = old_values[runs, batch.states].flatten(0, 1)
    dones = torch.zeros_like(rewards, dtype=torch.bool)
    advantages, returns = gae(rewards, seen[:, :-1], dones, last_value=seen[:, -1], gamma=GAMMA)
    old_logp = old.log_softmax(-1)[runs, states, actions].flatten(0, 1)
    mask = torch.ones_like(dones)
    share = float(ENVS * STEPS)  # a run's own mean: runs don't share anything

    def loss(logits: Tensor, values: Tensor, betas: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)[runs, states, actions].flatten(0, 1)
        fit = value_loss(values[runs, states].flatten(0, 1), returns, mask, normaliser=share)
        if method == METHODS[2]:
            kl = (betas[:, None] * categorical_kl(old, logits))[runs[..., 0], states.flatten(1)]
            kl = kl.view_as(states).flatten(0, 1)
            return ppo_kl_loss(logp, old_logp, advantages, kl, mask, beta=1.0, normaliser=share).loss + fit
        clip = 0.2 if method == METHODS[0] else math.inf
        return ppo_clip_loss(logp, old_logp, advantages, mask, clip=clip, normaliser=share).loss + fit

    return loss


def _rollout(process: _Process, logits: Tensor, generator: torch.Generator) -> _Batch:
    """Steps of all environments of all runs under the policy, from uniformly drawn states."""
    runs = torch.arange(len(logits))[:, None].expand(-1, ENVS)
    policy = logits.softmax(-1)
    state = torch.randint(STATES, (len(logits), ENVS), generator=generator)
    states, actions = [state], []
    for _ in range(STEPS):
        action = _draw(policy[runs, state], generator)
        state = _draw(process.transitions[runs, state, action], generator)
        states.append(state)
        actions.append(action)
    return _Batch(torch.stack(states, -1), torch.stack(actions, -1))


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    flat = probabilities.flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(probabilities.shape[:-1])


def _return(process: _Process, logits: Tensor) -> Tensor:
    """Exact discounted return of the policy from a uniformly drawn state, [runs]."""
    policy = logits.double().softmax(-1)
    step = torch.einsum("rsa,rsan->rsn", policy, process.transitions.double())
    reward = (policy * process.rewards).sum(-1)
    values = torch.linalg.solve(torch.eye(STATES, dtype=torch.float64) - GAMMA * step, reward[..., None])
    return values[..., 0].mean(1)


def _best(process: _Process) -> Tensor:
    """The return of the best policy, by value iteration."""
    values = torch.zeros(len(process.rewards), STATES, dtype=torch.float64)
    for _ in range(400):
        following = torch.einsum("rsan,rn->rsa", process.transitions.double(), values)
        values = (process.rewards + GAMMA * following).amax(-1)
    return values.mean(1)


def draw(outcome: Outcome) -> Figure:
    """Normalised return against batches."""
    figure, (axis,) = panels(1, width=6, height=3.8)
    for method in METHODS:
        axis.plot(outcome.series["batches"], outcome.series[method], label=method)
    axis.set(
        title="Ten epochs on each batch",
        xlabel=f"batches of {ENVS * STEPS} steps",
        ylabel="return (0: uniform policy, 1: best)",
    )
    axis.legend(loc="lower right")
    return figure
