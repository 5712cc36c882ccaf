r"""EVA: LoRA that starts along the principal components of each layer's inputs, with ranks by explained variance.

Paper: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation (arXiv:2410.07170).

Before training, the frozen model reads some batches of the fine-tuning data, and the principal components of each
layer's inputs are kept up to date by an incremental singular value decomposition until they stop turning. All
components of all layers are then ranked by the part of their layer's variance that they explain. A layer gets as many
rows of A as it has components among the best, which are these components; B is zero, so that the model is unchanged.

Equation:
    $$ X_l - \bar X_l = U_l \operatorname{diag}(\sigma_l) V_l^\top, \qquad
       \xi_{l,j} = \frac{\sigma_{l,j}^2}{\sum_i \sigma_{l,i}^2} \tag{1} $$
    $$ r_l = \bigl|\{ j : \xi_{l,j} \text{ among the largest } r L \text{ of all layers}\}\bigr|, \qquad
       j \le \operatorname{round}(\rho r) \tag{2} $$
    $$ A_l = V_{l,1..r_l}^\top, \qquad B_l = 0 \tag{3} $$
    $$ \text{component } j \text{ has converged when } \cos(v_j, v_j^{\text{before}}) \ge \tau \tag{4} $$

Symbols:
    X_l: [tokens, in_features], the inputs of layer l; its mean over tokens is taken off.
    sigma_l, V_l: singular values and right singular vectors. The sum in eq. (1) is over all in_features of them.
    L: how many layers are adapted.
    r: rank, of a layer on average.
    rho: a layer's rank is at most rho r.

Defaults:
    rank: 16 (section 4).
    rho: 2.0 (as in peft).
    tau: 0.99 (as in peft).
    alpha: 16 (ours); each layer's own is alpha r_l / r, so that all layers have the same scale (as in peft).

Deviations:
    1. The review speaks of the outputs of layers and of the ranks alone; in the paper it is the inputs, and their
       components are the initialisation as well.
    2. The variance in eq. (1) is about the mean, and over all components, as in peft; the paper divides by the sum of
       the singular values that are kept.
    3. The batches are gone through once: where they end before all components have converged, the last ones are taken,
       and the result says so. peft repeats them.

Reduces to:
    lora: but for where A starts, with rho = 1, where every layer has rank r.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mlreviews.common.adapter import inject, matching_layers
from mlreviews.common.checks import check_count, check_matrix, check_number
from mlreviews.peft.lora import LoRALinear

__all__ = ["EVAStart", "IncrementalSVD", "allocate_ranks", "eva_start", "inject_eva"]


class IncrementalSVD:
    """Principal components of rows that arrive in batches; memory of a batch and the components.

    Exact as long as the rows seen span no more than `components` directions about their mean; else what doesn't fit is
    dropped after each batch.

    Args:
        components: how many are kept.
        tau: the cosine of eq. (4).

    Attributes:
        components: [k, dim], orthonormal rows, largest variance first; None before the first batch.
        singular_values: [k].
        converged: [k] of bool, whether the last batch has hardly turned a component; None before the second one.

    Raises:
        ValueError: components below 1, or tau outside (-1, 1].
    """

    def __init__(self, components: int, tau: float = 0.99) -> None:
        check_count("components", components)
        check_number("tau", tau, above=-1.0)
        if tau > 1:
            raise ValueError(f"tau: expected at most 1, a cosine, got {tau}")
        self.size, self.tau = components, tau
        self.seen = 0
        self.components: Tensor | None = None
        self.converged: Tensor | None = None
        self.singular_values = torch.empty(0)
        self._mean = self._squares = torch.empty(0)

    @torch.no_grad()
    def partial_fit(self, x: Float[Tensor, "rows dim"]) -> None:
        """Takes in a batch.

        Args:
            x: [rows, dim], computed with in float32 at least.

        Raises:
            ValueError: not a matrix, NaN or infinity, fewer columns than components or another number than before, or
                a first batch of fewer rows than components.
        """
        check_matrix("x", x)
        rows, dim = x.shape
        before = self.components
        if dim < self.size or (before is not None and dim != before.shape[1]):
            wanted = f"at least {self.size}" if before is None else f"{before.shape[1]}"
            raise ValueError(f"x: expected {wanted} columns, got shape {tuple(x.shape)}")
        if before is None and rows < self.size:
            raise ValueError(f"x: expected at least {self.size} rows in the first batch, got {rows}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        centred = x - mean
        if before is None:
            self._mean, self._squares = mean, centred.square().sum(0)
            stacked = centred
        else:
            # Sums of squares about the common mean: each part's own, and that of the two means about it.
            shift = (self.seen * rows / (self.seen + rows)) ** 0.5 * (self._mean - mean)
            self._squares = self._squares + centred.square().sum(0) + shift.square()
            self._mean = self._mean + (mean - self._mean) * (rows / (self.seen + rows))
            stacked = torch.cat([self.singular_values[:, None] * before, centred, shift[None]])
        _, sigma, vh = torch.linalg.svd(stacked, full_matrices=False)
        # A vector and its negative are the same component: the largest entry is made positive.
        vh = vh[: self.size]
        largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
        self.components = vh * largest.sign()
        self.singular_values = sigma[: self.size]
        self.seen += rows
        if before is not None:
            self.converged = (self.components * before).sum(1) >= self.tau

    @property
    def explained_variance_ratio(self) -> Float[Tensor, " k"]:
        """[k], eq. (1): the part of the total variance along each component; 0 where nothing varies."""
        return self.singular_values.square() / self._squares.sum().clamp(min=torch.finfo(self._squares.dtype).tiny)


def allocate_ranks(ratios: Mapping[str, Float[Tensor, " _"]], budget: int) -> dict[str, int]:
    """How many of the best components belong to each layer, eq. (2).

    Args:
        ratios: layer -> explained variance ratios, largest first; as many as its rank may be at most.
        budget: the sum of all ranks, r L.

    Returns:
        Layer -> rank, 0 for some. Of equal ratios the earlier in a layer, then that of the smaller name, counts first.

    Raises:
        ValueError: no layers, or a budget of less than 1 or more than there are components.
    """
    total = sum(len(ratio) for ratio in ratios.values())
    check_count("budget", budget)
    if budget > total:
        raise ValueError(f"budget: expected at most the {total} components that there are, got {budget}")
    ranked = sorted((-float(value), j, name) for name, ratio in ratios.items() for j, value in enumerate(ratio))
    ranks = dict.fromkeys(ratios, 0)
    for _, _, name in ranked[:budget]:
        ranks[name] += 1
    return ranks


class EVAStart(NamedTuple):
    """Where LoRA is to start.

    Attributes:
        rows: path of a layer -> A, [r_l, in_features] in float32; layers of rank 0 with no rows.
        rank: r, of a layer on average.
        converged: whether all components that are used had converged.
        batches: how many were read.
    """

    rows: dict[str, Tensor]
    rank: int
    converged: bool
    batches: int


@torch.no_grad()
def eva_start(
    model: nn.Module,
    batches: Iterable[Any],
    targets: str | Iterable[str],
    rank: int = 16,
    rho: float = 2.0,
    tau: float = 0.99,
    *,
    whiten: bool = False,
    run: Callable[[nn.Module, Any], object] | None = None,
    keep: Callable[[Any], Bool[Tensor, "*tokens"]] | None = None,
) -> EVAStart:
    """Ranks and first values of A for the linear layers of a model.

    Args:
        model: unchanged; it reads in evaluation mode.
        batches: of the fine-tuning data, gone through until all components have converged.
        targets: regular expressions that match whole paths of linear layers.
        rank: r.
        rho: a layer's rank is at most round(rho r).
        tau: the cosine of eq. (4).
        whiten: whether each component is divided by the root of its singular value (as in peft).
        run: applies the model to a batch; None is ``model(batch)``.
        keep: from a batch to whether each token counts, such as whether it isn't padding and is a target.

    Raises:
        ValueError: a number out of range, no batches, targets that match nothing, or more components than a layer has
            inputs or the first batch tokens.
    """
    check_count("rank", rank)
    check_number("rho", rho, least=1.0)
    layers = matching_layers(model, targets)
    most = round(rho * rank)
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
        for path, layer in layers.items()
    ]
    training, count, leader = model.training, 0, dict[str, str]()
    trackers: dict[str, IncrementalSVD] = {}
    ranks = dict.fromkeys(layers, most)
    done = False
    try:
        model.eval()
        for batch in batches:
            inputs.clear()
            model(batch) if run is None else run(model, batch)
            count += 1
            if not leader:
                leader = _shared(inputs)
                trackers = {path: IncrementalSVD(most, tau) for path in leader.values()}
            for path, tracker in trackers.items():
                if not _settled(tracker, max(ranks[other] for other in layers if leader[other] == path)):
                    x = inputs[path].flatten(0, -2)
                    tracker.partial_fit(x if keep is None else x[keep(batch).flatten()])
            ranks = allocate_ranks(
                {path: trackers[leader[path]].explained_variance_ratio for path in layers}, rank * len(layers)
            )
            done = all(_settled(trackers[leader[path]], ranks[path]) for path in layers)
            if done:
                break
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("batches: expected at least one")
    rows = {}
    for path, own in ranks.items():
        tracker = trackers[leader[path]]
        assert tracker.components is not None
        a = tracker.components[:own].clone()
        rows[path] = a / tracker.singular_values[:own, None].sqrt() if whiten else a
    return EVAStart(rows, rank, done, count)


def _shared(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> the first layer that gets the same input, as queries, keys and values do."""
    leader: dict[str, str] = {}
    for path, x in inputs.items():
        same = (first for first in leader.values() if inputs[first] is x or torch.equal(inputs[first], x))
        leader[path] = next(same, path)
    return leader


def _settled(tracker: IncrementalSVD, rank: int) -> bool:
    return tracker.converged is not None and bool(tracker.converged[:rank].all())


def inject_eva(model: nn.Module, start: EVAStart, alpha: float = 16.0) -> list[str]:
    """Puts LoRA into a model where `eva_start` has found components, and leaves layers of rank 0 as they are.

    Args:
        model: the one that `eva_start` has read with; changed in place.
        start: of `eva_start`.
        alpha: of a layer of rank r; a layer of rank r_l has alpha r_l / r.

    Returns:
        The paths of the layers that have adapters now.

    Raises:
        ValueError: as `inject`.
    """
    used = {path: a for path, a in start.rows.items() if len(a)}

    def make(path: str, base: nn.Module) -> LoRALinear:
        a = used[path]
        # a generator of its own: what it draws is replaced
        layer = LoRALinear(base, len(a), alpha * len(a) / start.rank, generator=torch.Generator(a.device))
        layer.generator = None
        with torch.no_grad():
            layer.lora_A["default"].copy_(a)
        return layer

    return inject(model, [re.escape(path) for path in used], make)
