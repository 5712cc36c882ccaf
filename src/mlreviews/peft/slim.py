r"""SLIM: a mixture of LoRA experts and identity experts, which take tokens that are far from the fine-tuning data.

Paper: SLIM: Let LLM Learn More and Forget Less with Soft LoRA and Identity Mixture (arXiv:2410.07739).

A router sends each token to a few experts of a layer. Some are LoRA adapters, the others add nothing, so that a token
can pass as through the frozen layer. While training, clusters of the layer's inputs follow the data; a token far from
all of them has the weight of the identity experts increased. What was known before is so left alone, the more the less
an input resembles the new task.

Equation:
    $$ p = \operatorname{softmax}(R x), \qquad
       w_i = \begin{cases} p_i\,(1 + d) & i \text{ identity} \\ p_i & i \text{ LoRA} \end{cases} \tag{1} $$
    $$ d = \max\Bigl(\max_c \frac{\lvert x_c - \mu_{j,c} \rvert}{s_{j,c}} - 1,\; 0\Bigr), \qquad
       j = \operatorname*{arg\,min}_{j} \lVert x - \mu_j \rVert^2 \tag{2} $$
    $$ y = W x + b + \frac{1}{Z} \sum_{i \in \operatorname{top-}K(w)} w_i\, f_i(x), \qquad
       Z = \sum_{i \in \operatorname{top-}K(w)} w_i \tag{3} $$
    $$ f_i(x) = \frac{\alpha}{r} B_i A_i x \text{ for LoRA}, \qquad f_i(x) = 0 \text{ for identity} \tag{4} $$
    While training, rows of B and columns of A are dropped so that a part p of the entries of BA is 0, and what is left
    is divided by 1 - p (dynamic merging, after DARE). The penalty is the mean absolute value of A and of B.

Symbols:
    x: [*batch, in_features], the layer's input; y: [*batch, out_features].
    R: [experts, in_features], the router.
    mu, s: [clusters, in_features], centres, and standard deviations of each channel about them.
    A: [n_lora, rank, in_features]; B: [n_lora, out_features, rank], 0 at first.

Defaults:
    n_lora: 8 (section 4.2).
    n_identity: 2 (section 4.2).
    rank: 16 (section 4.2).
    top_k: 2 (equation 4).
    alpha: 32 (ours).
    n_clusters: 64 (ours; the paper doesn't say).
    momentum: 0.99 (ours; the paper doesn't say).
    drop: 0 (ours; the paper's masking rate is a setting of its figure 4).
    learning rate: 3e-4, batches of 16, 2 epochs (section 4.1).

Deviations:
    1. The paper writes f(x) = x for identity experts inside the sum, which would add the input to the output and needs
       in_features = out_features. What it describes, a token that passes as in the frozen model, is eq. (4).
    2. How the distance raises the weights is ours, as the paper's formula was not at hand; eq. (1) is one form,
       monotone and 1 for d = 0, and eq. (2) counts a distance from one standard deviation on.
    3. Centres start at inputs of the first batch, and not at random numbers. A centre moves by a running mean over the
       tokens nearest to it in each batch.

Reduces to:
    lora: n_lora = 1, n_identity = 0, top_k = 1.
    torch.nn.Linear: no LoRA expert among the chosen ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.adapter import Adapter, features
from mlreviews.common.checks import check_count, check_number, check_probability

__all__ = ["SLIMLinear", "SlidingClusters", "grouped_lora", "lora_mixture"]


def lora_mixture(
    x: Float[Tensor, "tokens in"],
    a: Float[Tensor, "experts rank in"],
    b: Float[Tensor, "experts out rank"],
    weights: Float[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens out"]:
    """The weighted sum of low-rank maps, another one for each token: two dense products over all experts.

    On a CPU it is the quicker form for 8 experts of which 2 are used, by 1.4 times and more; `grouped_lora` is for
    many.

    Args:
        x: [tokens, in].
        a: [experts, rank, in].
        b: [experts, out, rank].
        weights: [tokens, experts], 0 for experts that aren't used.
    """
    h = (x @ a.flatten(0, 1).mT).unflatten(1, a.shape[:2]) * weights[..., None]
    return h.flatten(1) @ b.mT.flatten(0, 1)


def grouped_lora(
    x: Float[Tensor, "tokens in"],
    a: Float[Tensor, "experts rank in"],
    b: Float[Tensor, "experts out rank"],
    experts: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens out"]:
    """The same sum with the tokens sorted by expert, and products of each expert with its own tokens alone.

    The work doesn't grow with the number of experts. On a CPU, for 2,000 tokens, it is the quicker form from some tens
    of experts on; of 64, by 2 to 4 times.

    Args:
        x: [tokens, in].
        a: [experts, rank, in].
        b: [experts, out, rank].
        experts: [tokens, k], which are used.
        weights: [tokens, k], of these.

    Raises:
        ValueError: an expert that there isn't.
    """
    if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < len(a):
        raise ValueError(f"experts: expected numbers from 0 to {len(a) - 1}, got up to {int(experts.max())}")
    flat = experts.flatten()
    order = flat.argsort()
    token = order // experts.shape[1]
    parts = x[token].split(flat.bincount(minlength=len(a)).tolist())
    outputs = torch.cat([(part @ a[e].mT) @ b[e].mT for e, part in enumerate(parts)])
    return x.new_zeros(len(x), b.shape[1]).index_add(0, token, outputs * weights.flatten()[order, None])


class SlidingClusters(nn.Module):
    """Centres and deviations of clusters that follow the inputs seen in training.

    Args:
        clusters: how many.
        dim: of an input.
        momentum: what a centre keeps of its place in an update.
    """

    centres: Tensor
    variances: Tensor
    started: Tensor

    def __init__(self, clusters: int, dim: int, momentum: float = 0.99) -> None:
        super().__init__()
        check_count("clusters", clusters)
        check_count("dim", dim)
        check_probability("momentum", momentum)
        self.momentum = momentum
        self.register_buffer("centres", torch.zeros(clusters, dim))
        self.register_buffer("variances", torch.ones(clusters, dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def nearest(self, h: Float[Tensor, "tokens dim"]) -> Int[Tensor, " tokens"]:
        """The closest centre of each input, [tokens], by Euclidean distance."""
        # |h|^2 is the same for all centres
        return (self.centres.square().sum(1) - 2 * h.to(self.centres.dtype) @ self.centres.mT).argmin(1)

    def distance(self, h: Float[Tensor, "tokens dim"]) -> Float[Tensor, " tokens"]:
        """[tokens], d of eq. (2), in standard deviations; 0 for every input before the first update."""
        near = self.nearest(h)
        deviations = (h.to(self.centres.dtype) - self.centres[near]).abs() / self.variances[near].sqrt()
        return torch.where(self.started, (deviations.amax(1) - 1).clamp(min=0), 0.0)

    def forward(self, h: Float[Tensor, "tokens dim"]) -> Float[Tensor, " tokens"]:
        """`update`, and then `distance`."""
        self.update(h)
        return self.distance(h)

    @torch.no_grad()
    def update(self, h: Float[Tensor, "tokens dim"]) -> None:
        """Moves the centres and deviations towards the inputs nearest to each; nothing happens in evaluation mode.

        Args:
            h: [tokens, dim]. The first time, centres are put on inputs at equal distances in the batch, and every
                deviation is that of the whole batch.
        """
        if not self.training:
            return
        h = h.to(self.centres.dtype)
        # Without branches on values: a graph can be captured, and no value goes to the host.
        places = torch.linspace(0, len(h) - 1, len(self.centres), device=h.device).long()
        spread = h.var(0, correction=0).clamp(min=1e-6).expand_as(self.variances)
        self.centres.copy_(torch.where(self.started, self.centres, h[places]))
        self.variances.copy_(torch.where(self.started, self.variances, spread))
        self.started.fill_(True)
        member = nn.functional.one_hot(self.nearest(h), len(self.centres)).to(h.dtype)
        count = member.sum(0)[:, None]
        mean = member.mT @ h / count.clamp(min=1)
        squares = member.mT @ h.square() / count.clamp(min=1)
        about = (squares - 2 * mean * self.centres + self.centres.square()).clamp(min=1e-6)
        share = torch.where(count > 0, 1 - self.momentum, 0.0)
        self.variances.lerp_(about, share.expand_as(about))
        self.centres.lerp_(mean, share.expand_as(mean))


class SLIMLinear(Adapter):
    """A linear layer with LoRA and identity experts, eq. (3).

    Args:
        base: torch.nn.Linear, or what has its attributes, or transformers' Conv1D.
        n_lora: LoRA experts.
        n_identity: identity experts.
        rank: of a LoRA expert.
        alpha: the scale of a LoRA expert is alpha / rank.
        top_k: experts that a token is sent to.
        n_clusters: clusters of the inputs.
        momentum: of the clusters.
        drop: p, the part of each BA that is dropped in training.
        generator: draws the weights and, in training, what is dropped; None is the global one.

    Raises:
        ValueError: a number out of range, or top_k larger than the number of experts.
    """

    mergeable: ClassVar[bool] = False

    def __init__(
        self,
        base: nn.Module,
        n_lora: int = 8,
        n_identity: int = 2,
        rank: int = 16,
        alpha: float = 32.0,
        top_k: int = 2,
        n_clusters: int = 64,
        *,
        momentum: float = 0.99,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        columns, rows = features(base)
        for name, value in (("n_lora", n_lora), ("rank", rank), ("top_k", top_k)):
            check_count(name, value)
        check_count("n_identity", n_identity, least=0)
        check_number("alpha", alpha)
        check_probability("drop", drop)
        if drop == 1 or top_k > n_lora + n_identity:
            raise ValueError(
                f"top_k, drop: expected at most {n_lora + n_identity} experts and drop below 1, got {top_k} and {drop}"
            )
        self.n_lora, self.top_k, self.scaling, self.drop, self.generator = n_lora, top_k, alpha / rank, drop, generator
        weight = self.base.weight
        wide = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.router = nn.Parameter(torch.empty(n_lora + n_identity, columns, **wide))
        self.lora_A = nn.Parameter(torch.empty(n_lora, rank, columns, **wide))
        self.lora_B = nn.Parameter(torch.zeros(n_lora, rows, rank, **wide))
        for parameter in (self.router, self.lora_A):
            nn.init.uniform_(parameter, -(columns**-0.5), columns**-0.5, generator=generator)
        self.clusters = SlidingClusters(n_clusters, columns, momentum).to(**wide)

    def routing(self, h: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens experts"]:
        """Weights of eq. (3), divided by Z: [tokens, experts], LoRA experts first, 0 for those that aren't chosen.

        In training, the clusters follow the input first.
        """
        p = nn.functional.linear(h, self.router.to(h.dtype)).softmax(-1)
        yielding = 1 + self.clusters(h)[:, None].to(p.dtype)
        w = torch.cat([p[:, : self.n_lora], p[:, self.n_lora :] * yielding], dim=1)
        chosen = w.topk(self.top_k, dim=1)
        kept = torch.zeros_like(w).scatter(1, chosen.indices, chosen.values)
        return kept / kept.sum(1, keepdim=True)

    def change(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """What the chosen LoRA experts add, in float32 or wider."""
        h = x.flatten(0, -2).to(torch.promote_types(self.router.dtype, torch.float32))
        a, b = self._dropped()
        added = lora_mixture(h, a.to(h.dtype), b.to(h.dtype), self.routing(h)[:, : self.n_lora] * self.scaling)
        return added.view(*x.shape[:-1], added.shape[-1])

    def penalty(self) -> Float[Tensor, ""]:
        """The mean absolute value of A plus that of B, to be added to the loss with a weight."""
        return self.lora_A.abs().mean() + self.lora_B.abs().mean()

    def _dropped(self) -> tuple[Tensor, Tensor]:
        """A and B with columns and rows dropped, so that 1 - p of the entries of BA are left."""
        if not self.training or self.drop == 0:
            return self.lora_A, self.lora_B
        keep = (1 - self.drop) ** 0.5
        parts = []
        for parameter, shape in ((self.lora_A, (self.n_lora, 1, -1)), (self.lora_B, (self.n_lora, -1, 1))):
            long = parameter.shape[2] if shape[2] == -1 else parameter.shape[1]
            drawn = torch.rand(self.n_lora, long, device=parameter.device, generator=self.generator)
            parts.append(parameter * (drawn < keep).view(shape) / keep)
        return parts[0], parts[1]
