r"""Mamba-2: a state-space model that is at the same time a masked attention, and is computed by matrix products.

Paper: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
    (arXiv:2405.21060).

With one decay per head and time (instead of one per channel and state), the recurrence of Mamba is the product of the
inputs with a matrix that can be written down: an attention matrix without softmax, masked by products of decays. The
recurrent form takes linear time, the attention form uses matrix units; in chunks one has both.

Equation:
    For each head with the state $H_t \in \mathbb{R}^{N \times P}$ (equation 2 and section 5.1 of the paper):
    $$ H_t = a_t H_{t-1} + B_t x_t^\top, \qquad y_t = H_t^\top C_t \tag{1} $$
    or as one matrix, with the 1-semiseparable mask L (equations 6 and 16 of the paper):
    $$ Y = M X, \qquad M = L \circ (C B^\top), \qquad L_{ij} = a_{j+1} \cdots a_i = e^{S_{ij}} \text{ for } i \ge j
       \text{, else } 0 \tag{2} $$
    $$ S_{ij} = \sum_{k=j+1}^{i} \log a_k \text{ for } i \ge j, \quad -\infty \text{ else} \tag{3} $$
    Any block of M on or below the diagonal has rank N at most (definition 3.1 and theorem 3.5).
    The block of the paper (section 7):
    $$ [z, x, B, C, \delta] = W_{in} u, \qquad [x, B, C] \leftarrow \mathrm{silu}(\mathrm{conv}([x, B, C])), \qquad
       \Delta = \mathrm{softplus}(\delta + b_\Delta) \tag{4} $$
    $$ a_t = e^{\Delta_t A}, \qquad y = \mathrm{SSM}(\Delta x, a, B, C) + D x, \qquad
       W_{out}\, \mathrm{RMSNorm}(y\, \mathrm{silu}(z)) \tag{5} $$

Symbols:
    u: [batch, time, d_model], the input of the block.
    x: [batch, time, heads, P], the input of the state-space model, P = headdim; heads * P = d_inner = expand * d_model.
    a: [batch, time, heads], decays in (0, 1].
    Delta: [batch, time, heads], step sizes, positive.
    B, C: [batch, time, groups, N], shared by the heads of a group.
    A, D: [heads], rates, negative, A = -exp(A_log); and the skip connection.
    z: [batch, time, d_inner], the gate.
    H: [batch, heads, N, P], the state.

Defaults:
    d_state: 128, N (authors' code; 64 to 256 in section 9).
    headdim: 64, P (section 7.2, authors' code).
    d_conv: 4 (authors' code).
    expand: 2 (authors' code).
    ngroups: 1 (multi-input SSM, section 7.2).
    chunk_size: 256 (authors' code); changes cost and rounding only.
    A: uniform in [-16, -1] (authors' code).
    b_Delta: such that step sizes are log-uniform in [0.001, 0.1] (authors' code).

Deviations:
    1. Delta multiplies x and not B, which gives the same product; the skip connection takes x as it was.
    2. Step sizes have no upper limit (time_step_limit of transformers is (0, infinity) as well).

Reduces to:
    mamba: with equal rates in all states of a channel, P = 1 and B, C shared by all channels.
    causal linear attention: with a = 1, C, B, x for queries, keys, values, and no normaliser.
    RetNet retention: with a constant in time; the mask is that of its decay.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_sequence
from mlreviews.common.layers import causal_conv1d, depthwise_conv1d, linear
from mlreviews.ssm.mamba import MambaState, initial_dt_bias, without
from mlreviews_kernels.ssd import ssd, ssd_step

__all__ = ["GatedRMSNorm", "Mamba2Block", "segsum", "ssd_matrix"]


def segsum(log_a: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time time"]:
    """Equation (3): sums over every stretch, each added up by itself, so that nothing cancels.

    Args:
        log_a: [..., time], logarithms of decays; -inf for a decay of 0.

    Returns:
        S, [..., time, time]: 0 on the diagonal, -inf above.
    """
    time = log_a.shape[-1]
    ones = torch.ones(time, time, dtype=torch.bool, device=log_a.device)
    terms = log_a[..., :, None].expand(*log_a.shape, time).masked_fill(~ones.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))


def ssd_matrix(
    log_a: Float[Tensor, "batch time heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
) -> Float[Tensor, "batch heads time time"]:
    """M of equation (2), the attention form: y = M x for every head. Quadratic in time; the truth, not the fast way.

    Args:
        log_a: [batch, time, heads].
        B: [batch, time, groups, N]; group g belongs to the heads from g * heads / groups on.
        C: like B.

    Raises:
        ValueError: the number of groups does not divide that of heads.
    """
    heads, groups = log_a.shape[2], B.shape[2]
    if heads % groups:
        raise ValueError(f"B: expected a number of groups that divides {heads} heads, got {groups}")
    scores = torch.einsum("bign,bjgn->bgij", C, B).repeat_interleave(heads // groups, dim=1)
    return segsum(log_a.mT).exp() * scores


class GatedRMSNorm(nn.Module):
    """RMSNorm of y silu(z) of (5), over each of the groups of channels by itself; computed in float32 at least.

    Args:
        channels: size of the last axis.
        groups: how many groups of neighbouring channels; must divide channels.
        eps: added to the mean square.

    Raises:
        ValueError: a count below 1, or groups that don't divide the channels.
    """

    def __init__(self, channels: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("groups", groups)
        if channels % groups:
            raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(
        self, y: Float[Tensor, "*batch channels"], z: Float[Tensor, "*batch channels"]
    ) -> Float[Tensor, "*batch channels"]:
        """The gated and normed y.

        Args:
            y: [..., channels].
            z: the gate, of y's shape.
        """
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(wide) * nn.functional.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.flatten(-2).to(y.dtype)


class Mamba2Block(nn.Module):
    """The block of the paper, figure 6. Parameters have the names of the authors' code and of transformers.

    Args:
        d_model: size of input and output.
        d_state: N.
        headdim: P; must divide expand * d_model.
        expand: channels as a multiple of d_model.
        d_conv: width of the convolution.
        ngroups: groups of heads, each with its own B and C; must divide the number of heads.
        chunk_size: of the scan; changes cost and rounding only.
        bias: whether in_proj and out_proj have biases.
        conv_bias: whether the convolution has one.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, or sizes that don't divide as they must.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        headdim: int = 64,
        expand: int = 2,
        d_conv: int = 4,
        ngroups: int = 1,
        chunk_size: int = 256,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "headdim": headdim, "expand": expand, "d_conv": d_conv}
        for name, size in (sizes | {"ngroups": ngroups, "chunk_size": chunk_size}).items():
            check_count(name, size)
        self.d_model, self.d_inner, self.d_state, self.headdim = d_model, expand * d_model, d_state, headdim
        self.ngroups, self.chunk_size = ngroups, chunk_size
        self.heads, rest = divmod(self.d_inner, headdim)
        if rest:
            raise ValueError(f"headdim: expected a divisor of {self.d_inner} channels, got {headdim}")
        if self.heads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of {self.heads} heads, got {ngroups}")
        convolved = self.d_inner + 2 * ngroups * d_state
        self.in_proj = linear(d_model, self.d_inner + convolved + self.heads, bias=bias, generator=generator)
        self.conv1d = depthwise_conv1d(convolved, d_conv, bias=conv_bias, generator=generator)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.heads, generator=generator))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16, generator=generator).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.d_inner, ngroups)
        self.out_proj = linear(self.d_inner, d_model, bias=bias, generator=generator)

    def forward(
        self,
        u: Float[Tensor, "batch time d_model"],
        state: MambaState | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        cu_seqlens: Int[Tensor, " documents_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], MambaState]:
        """Runs over a sequence.

        Args:
            u: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.
            mask: [batch, time], False at padding, which has to be on the left of the first token of a row. The outputs
                there have no meaning.
            cu_seqlens: [documents + 1], where documents packed into the one row (batch 1) begin and end; states are
                then one a document.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token, with ``state.ssm``
            [batch, heads, N, P] (transformers and the authors have P before N).

        Raises:
            ValueError: u, state or mask has another shape.
        """
        check_sequence(u, self.d_model, mask, "u")
        z, xBC, delta = self._project(u)
        window, ssm = (None, None) if state is None else state
        xBC, window = self._convolve(without(xBC, mask), window, cu_seqlens)
        x, B, C = self._split(without(xBC, mask))
        step_size, log_a = self._steps(delta)
        y, ssm = ssd(
            self._scaled(x, step_size),
            log_a,
            B,
            C,
            chunk_size=self.chunk_size,
            initial_state=ssm,
            cu_seqlens=cu_seqlens,
        )
        return self._finish(y, x, z), MambaState(window, ssm)

    def step(
        self, u_t: Float[Tensor, "batch d_model"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], MambaState]:
        """One token, [batch, d_model]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        if u_t.ndim != 2:
            raise ValueError(f"u_t: expected [batch, {self.d_model}], got shape {tuple(u_t.shape)}")
        if state is None:
            y, state = self(u_t[:, None])
            return y[:, 0], state
        check_sequence(u_t[:, None], self.d_model, name="u")
        z, xBC, delta = self._project(u_t)
        xBC, window = self._convolve(xBC[:, None], state.conv, None)
        x, B, C = self._split(xBC[:, 0])
        step_size, log_a = self._steps(delta)
        y, ssm = ssd_step(self._scaled(x, step_size), log_a, B, C, None, state.ssm)
        return self._finish(y, x, z), MambaState(window, ssm)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.d_inner, self.d_inner + 2 * self.ngroups * self.d_state, self.heads]
        z, xBC, delta = self.in_proj(u).split(sizes, dim=-1)
        return z, xBC, delta

    def _convolve(self, xBC: Tensor, window: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        xBC, window = causal_conv1d(xBC, self.conv1d.weight[:, 0], self.conv1d.bias, window, cu_seqlens=cu_seqlens)
        return nn.functional.silu(xBC), window

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_inner, shared, shared], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.heads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _steps(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Delta and log a of (5), in float32 at least."""
        wide = torch.promote_types(delta.dtype, torch.float32)
        step_size = nn.functional.softplus(delta.to(wide) + self.dt_bias.to(wide))
        return step_size, -torch.exp(self.A_log.to(wide)) * step_size

    @staticmethod
    def _scaled(x: Tensor, step_size: Tensor) -> Tensor:
        return (x * step_size[..., None]).to(x.dtype)

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = y + self.D[:, None].to(y.dtype) * x
        return self.out_proj(self.norm(y.flatten(-2), z))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, d_state={self.d_state}, heads={self.heads}, headdim={self.headdim}"
