r"""minGRU, minLSTM: gated recurrent networks whose gates don't look at the state, so that a scan computes all times.

Paper: Were RNNs All We Needed? (arXiv:2410.01201).

The GRU and the LSTM can't be trained in parallel because their gates and candidates depend on the state before. Without
that dependence (and without the bounds by tanh) what is left is linear in the state. Written for positive candidates,
the recurrence is computed in logarithms.

Equation:
    minGRU (section 3.1), plain:
    $$ z_t = \sigma(W_z x_t + b_z), \qquad \tilde h_t = W_h x_t + b_h, \qquad
       h_t = (1 - z_t) \odot h_{t-1} + z_t \odot \tilde h_t \tag{1} $$
    minLSTM (section 3.2), the two gates divided by their sum:
    $$ f'_t = \frac{f_t}{f_t + i_t}, \qquad i'_t = \frac{i_t}{f_t + i_t}, \qquad
       h_t = f'_t \odot h_{t-1} + i'_t \odot \tilde h_t \tag{2} $$
    with $f_t = \sigma(W_f x_t + b_f)$ and $i_t = \sigma(W_i x_t + b_i)$. In log space (appendix B) the candidate is
    made positive,
    $$ \tilde h_t = g(W_h x_t + b_h), \qquad g(v) = v + \tfrac12 \text{ for } v \ge 0, \text{ else } \sigma(v)
       \tag{3} $$
    and with a for the factor and b for the rest, and the state before the first time as $b_0$,
    $$ \log h_t = a^*_t + \log \sum_{s=0}^t e^{\log b_s - a^*_s}, \qquad a^*_t = \sum_{s=1}^t \log a_s \tag{4} $$

Symbols:
    x: [batch, time, dim], the input.
    z, f, i: [batch, time, d_hidden], gates.
    \tilde h: [batch, time, d_hidden], the candidate.
    h: [batch, time, d_hidden], the state, which is also the output (before out_proj); d_hidden = expansion * dim.

Defaults:
    expansion: 1 (section 3.1).
    log_space: True (appendix B; what the paper trains).
    biases: yes (torch.nn.Linear in appendix B).

Deviations:
    1. (4) is `parallel_scan_log`. The layers don't use it: it subtracts cumulative sums, which loses digits on long
       sequences and gives NaN once a gate is shut in floating point. They use a scan that carries log h itself.
    2. A given state enters linearly in both forms, so it may have any sign; the paper's listing takes its logarithm in
       the parallel form (and g of it in one of its listings) and not in the sequential one.
    3. out_proj maps back to dim; where expansion is 1 there is none.

Reduces to:
    torch.nn.GRU: with a tanh after linear_h, the plain form is a GRU whose weights from the state are zero; its update
        gate is 1 - z.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from mlreviews.common.checks import check_count, check_number, check_sequence
from mlreviews.common.layers import linear
from mlreviews_kernels.linear_scan import linear_scan, linear_scan_step, log_linear_scan

__all__ = ["MinGRU", "MinLSTM", "log_g", "parallel_scan_log"]


def log_g(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The logarithm of g in (3), without overflow or cancellation.

    Args:
        v: any numbers.
    """
    return torch.where(v >= 0, torch.log(v.clamp(min=0) + 0.5), logsigmoid(v))


def parallel_scan_log(
    log_coeffs: Float[Tensor, "batch time channels"], log_values: Float[Tensor, "batch time_plus_1 channels"]
) -> Float[Tensor, "batch time channels"]:
    """Equation (4), as the paper computes it: one cumulative sum and one cumulative log-sum-exp.

    Args:
        log_coeffs: log a, [batch, time, channels].
        log_values: log b, [batch, time + 1, channels], with the logarithm of the first state in front.

    Returns:
        h, not its logarithm, [batch, time, channels].

    Raises:
        ValueError: the shapes don't go together.
    """
    batch, time, channels = log_coeffs.shape
    if tuple(log_values.shape) != (batch, time + 1, channels):
        raise ValueError(f"log_values: expected {[batch, time + 1, channels]}, got shape {tuple(log_values.shape)}")
    a_star = nn.functional.pad(log_coeffs.cumsum(1), (0, 0, 1, 0))
    return (a_star + torch.logcumsumexp(log_values - a_star, dim=1))[:, 1:].exp()


class _MinRNN(nn.Module):
    """What the two have in common: all but the gates."""

    def __init__(
        self, dim: int, expansion: float, log_space: bool, gates: tuple[str, ...], generator: torch.Generator | None
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_number("expansion", expansion, above=0.0)
        self.dim, self.d_hidden, self.log_space = dim, round(expansion * dim), log_space
        if self.d_hidden == 0:
            raise ValueError(f"expansion: expected at least one hidden unit, got {expansion} for dim {dim}")
        for name in (*gates, "h"):
            setattr(self, f"linear_{name}", linear(dim, self.d_hidden, generator=generator))
        same = self.d_hidden == dim
        self.out_proj = nn.Identity() if same else linear(self.d_hidden, dim, bias=False, generator=generator)
        self.linear_h: nn.Linear

    def log_gates(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        """Logarithms of the factors of the state before and of the candidate; their exponentials add up to 1.

        Args:
            x: [..., dim].
        """
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Float[Tensor, "sequences hidden"] | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        cu_seqlens: Int[Tensor, " documents_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "sequences hidden"]]:
        """Runs over a sequence.

        Args:
            x: [batch, time, dim].
            state: h, [batch, d_hidden], as an earlier call returned it; None is zeros.
            mask: [batch, time], False at padding, where the state stays as it is.
            cu_seqlens: [documents + 1], where documents packed into the one row (batch 1) begin and end; states are
                then one a document.

        Returns:
            ``(y, state)``: [batch, time, dim], and h after the last token (float32 for half-precision models).

        Raises:
            ValueError: x, state or mask has another shape.
        """
        check_sequence(x, self.dim, mask)
        log_keep, log_take = self.log_gates(x)
        if mask is not None:
            padding = ~mask[..., None]
            log_keep, log_take = log_keep.masked_fill(padding, 0.0), log_take.masked_fill(padding, float("-inf"))
        # Autocast gives logarithms and exponentials another dtype than products; the scans want one for both.
        candidate = self.linear_h(x)
        if not self.log_space:
            b = log_take.exp() * candidate
            h, last = linear_scan(log_keep.exp().to(b.dtype), b, state, cu_seqlens=cu_seqlens)
            return self.out_proj(h), last
        log_b = log_take + log_g(candidate)
        log_h, log_last = log_linear_scan(log_keep.to(log_b.dtype), log_b, cu_seqlens=cu_seqlens)
        h, last = log_h.exp(), log_last.exp()
        if state is not None:
            # The recurrence is linear: what is left of the first state is added, whatever its sign.
            keep = log_keep.exp().to(h.dtype)
            rest, left = linear_scan(keep, torch.zeros_like(h), state, cu_seqlens=cu_seqlens)
            h, last = h + rest, last + left
        return self.out_proj(h), last

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: Float[Tensor, "batch hidden"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch hidden"]]:
        """One token, [batch, dim]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        if x_t.ndim != 2:
            raise ValueError(f"x_t: expected [batch, {self.dim}], got shape {tuple(x_t.shape)}")
        check_sequence(x_t[:, None], self.dim)
        log_keep, log_take = self.log_gates(x_t)
        candidate = self.linear_h(x_t)
        b = torch.exp(log_take + log_g(candidate)) if self.log_space else log_take.exp() * candidate
        if state is None:
            state = b.new_zeros(b.shape, dtype=torch.promote_types(b.dtype, torch.float32))
        h, state = linear_scan_step(log_keep.exp(), b, state)
        return self.out_proj(h), state

    def extra_repr(self) -> str:
        """Sizes and form."""
        return f"dim={self.dim}, d_hidden={self.d_hidden}, log_space={self.log_space}"


class MinGRU(_MinRNN):
    """The layer of equation (1), or of (1) with (3).

    Args:
        dim: size of input and output.
        expansion: hidden units as a multiple of dim; the product is rounded.
        log_space: positive candidates by (3) and the scan in logarithms; else (1) as it stands.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: dim below 1, or no hidden unit.
    """

    def __init__(
        self, dim: int, expansion: float = 1.0, log_space: bool = True, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(dim, expansion, log_space, ("z",), generator)
        self.linear_z: nn.Linear

    def log_gates(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        """log(1 - z) and log z.

        Args:
            x: [..., dim].
        """
        k = self.linear_z(x)
        return logsigmoid(-k), logsigmoid(k)


class MinLSTM(_MinRNN):
    """The layer of equation (2), or of (2) with (3). It depends on the ratio of its two gates only.

    Args:
        dim: size of input and output.
        expansion: hidden units as a multiple of dim; the product is rounded.
        log_space: positive candidates by (3) and the scan in logarithms; else (2) as it stands.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: dim below 1, or no hidden unit.
    """

    def __init__(
        self, dim: int, expansion: float = 1.0, log_space: bool = True, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(dim, expansion, log_space, ("f", "i"), generator)
        self.linear_f: nn.Linear
        self.linear_i: nn.Linear

    def log_gates(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch hidden"], Float[Tensor, "*batch hidden"]]:
        """log f' and log i'.

        Args:
            x: [..., dim].
        """
        # i / f = exp(ratio), and f' = 1 / (1 + i / f).
        ratio = softplus(-self.linear_f(x)) - softplus(-self.linear_i(x))
        return logsigmoid(-ratio), logsigmoid(ratio)
