r"""State collapse mitigations: Mamba-2's recurrence over a window, with a bounded state, or with more forgetting.

Paper: Stuffed Mamba: State Collapse and State Capacity of RNN-Based Long-Context Modeling (arXiv:2410.07145; later
    versions: Oversized States Lead to the Inability to Forget).

A recurrent model whose state is larger than its training length needs never learns to forget. On longer inputs the
state goes on growing, a few channels dominate, and the predictions break down: the state collapses. Three changes of
the recurrence need no training: a state of the last r tokens only, a state of bounded norm, and smaller decays and
inputs. The blocks of a trained model can be run with any of them.

Equation:
    The recurrence of Mamba-2, for each head, with $B_t$ and $x_t$ as they enter the state,
    $$ h_t = \alpha_t h_{t-1} + B_t x_t^\top, \qquad y_t = h_t^\top C_t \tag{1} $$
    and the three mitigations (section 3.3 of the first version). A window, by the difference of two states:
    $$ h_t^{(r)} = h_t - \Big( \prod_{j=t-r+1}^{t} \alpha_j \Big) h_{t-r} \tag{2} $$
    A bound on the norm, which makes the recurrence nonlinear:
    $$ \hat h_t = \alpha_t h_{t-1} + B_t x_t^\top, \qquad h_t = \hat h_t \min(1, p / \|\hat h_t\|) \tag{3} $$
    Forget more and remember less:
    $$ \alpha_t \leftarrow c_a \alpha_t, \qquad B_t \leftarrow c_b B_t \tag{4} $$

Symbols:
    x: [batch, time, heads, dim], the input, times the step size.
    alpha: [batch, time, heads], decays, given as log_a.
    B, C: [batch, time, groups, state], each for the heads of its group.
    h: [batch, heads, state, dim], the state; the norm of (3) is over its last two axes.
    r: the window, in tokens, t among them.
    p: the largest norm.
    c_a, c_b: in [0, 1].

Defaults:
    chunk_size: 64 (ours); changes cost and rounding only.
    every: 64 (ours), tokens between two looks at the state.

Deviations:
    1. The weight of input i in $h_t$ is the product of $\alpha_j$ from i + 1 on, as (1) has it; the paper's sum starts
       at i.
    2. The difference (2) is taken between states that begin at the last multiple of r before the window, not at the
       first token: what cancels is never more than a window, so that no digits are lost on long inputs.
    3. (3) is computed step by step, except in chunks where $\|h_t\| \le \alpha_t \|h_{t-1}\| + \|B_t\| \|x_t\|$ shows
       that nothing will be cut.
    4. The fits of training length and of recall length to the state size are not here; they are found by training.

Reduces to:
    mamba-2: with a window as long as the sequence, with p infinite, and with c_a = c_b = 1.
    sliding-window linear attention: (2) with alpha = 1, without normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_probability, check_sequence
from mlreviews.ssm.mamba import MambaState
from mlreviews.ssm.mamba_2 import Mamba2Block
from mlreviews_kernels.linear_scan import linear_scan
from mlreviews_kernels.ssd import ssd, ssd_step

__all__ = [
    "MitigatedMamba2",
    "StateCollapseMonitor",
    "WindowState",
    "clipped_ssd",
    "scaled_ssd",
    "sliding_state",
    "windowed_ssd",
]

Scan = Callable[..., tuple[Tensor, Any]]


class WindowState(NamedTuple):
    """What `windowed_ssd` needs to go on.

    Attributes:
        h: [batch, heads, state, dim], the state (2) after the last token.
        x: the inputs of the last r - 1 tokens (fewer at the beginning), [batch, past, heads, dim].
        log_a: their decays, [batch, past, heads].
        B: theirs, [batch, past, groups, state].
    """

    h: Tensor
    x: Tensor
    log_a: Tensor
    B: Tensor


def window_sums(log_a: Float[Tensor, "batch time heads"], window: int) -> Float[Tensor, "batch time heads"]:
    """Sums over the last tokens: of t, and of all but window - 1 before it.

    Args:
        log_a: [batch, time, heads]; -inf is fine, as nothing is subtracted.
        window: how many tokens.
    """
    time = log_a.shape[1]
    chunks = _chunks(log_a, min(window, time))
    rest = chunks.flip(2).cumsum(2).flip(2)[:, :-1, 1:]  # what of the chunk before is in the window
    before = nn.functional.pad(rest, (0, 0, 0, 1, 1, 0))
    return (chunks.cumsum(2) + before).flatten(1, 2)[:, :time]


def sliding_state(
    h: Float[Tensor, "batch time heads state dim"], log_a: Float[Tensor, "batch time heads"], window: int
) -> Float[Tensor, "batch time heads state dim"]:
    """Equation (2) for given states at all times.

    Args:
        h: states of (1) from zero, [batch, time, heads, state, dim].
        log_a: logarithms of the decays, [batch, time, heads].
        window: r.

    Returns:
        The states of the last r tokens.

    Raises:
        ValueError: window below 1.
    """
    check_count("window", window)
    window = min(window, h.shape[1])
    lagged = nn.functional.pad(h, (0, 0, 0, 0, 0, 0, window, 0))[:, : h.shape[1]]
    return h - window_sums(log_a, window).exp()[..., None, None] * lagged


def windowed_ssd(
    x: Float[Tensor, "batch time heads dim"],
    log_a: Float[Tensor, "batch time heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
    window: int,
    *,
    initial_state: WindowState | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], WindowState]:
    """The scan of the last r tokens (2), in two scans of chunks of r tokens.

    Args:
        x: [batch, time, heads, dim].
        log_a: logarithms of the decays, [batch, time, heads].
        B: [batch, time, groups, state].
        C: like B.
        window: r; 1 looks at the present token only.
        initial_state: what an earlier call with this window returned; None before the first token.

    Returns:
        ``(y, state)``: [batch, time, heads, dim] in x's dtype, and what the next call needs.

    Raises:
        ValueError: window below 1, or shapes that don't go together.
    """
    check_count("window", window)
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, time = x.dtype, x.shape[1]
    x, log_a, B, C = (tensor.to(wide) for tensor in (x, log_a, B, C))
    if initial_state is not None:
        _, *past = initial_state
        x, log_a, B = (torch.cat(pair, 1) for pair in zip(past, (x, log_a, B), strict=True))
        C = nn.functional.pad(C, (0, 0, 0, 0, x.shape[1] - time, 0))
    length = x.shape[1]
    size = min(window, length)
    pieces = [_chunks(tensor, size) for tensor in (x, log_a, B, C)]
    count = pieces[0].shape[1]
    chunked_x, chunked_log_a, chunked_B, chunked_C = (piece.flatten(0, 1) for piece in pieces)
    # States of each chunk by itself, read by the queries one window later, and at their end.
    queries = nn.functional.pad(pieces[3][:, 1:], (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
    lagged, ends = ssd(chunked_x, chunked_log_a, chunked_B, queries)
    before = nn.functional.pad(ends.unflatten(0, (-1, count))[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1)
    y, _ = ssd(chunked_x, chunked_log_a, chunked_B, chunked_C, initial_state=before)
    y, lagged = (tensor.unflatten(0, (-1, count)).flatten(1, 2)[:, :length] for tensor in (y, lagged))
    lagged = nn.functional.pad(lagged, (0, 0, 0, 0, size, 0))[:, :length]
    y = y - window_sums(log_a, size).exp()[..., None] * lagged
    _, h = ssd(x[:, -window:], log_a[:, -window:], B[:, -window:], B[:, -window:])
    kept = [tensor[:, max(0, length - window + 1) :] for tensor in (x, log_a, B)]
    return y[:, -time:].to(dtype), WindowState(h, *kept)


def clipped_ssd(
    x: Float[Tensor, "batch time heads dim"],
    log_a: Float[Tensor, "batch time heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
    max_norm: float,
    *,
    chunk_size: int = 64,
    initial_state: Float[Tensor, "batch heads state dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch heads state dim"]]:
    """The scan with states of bounded norm (3). Step by step wherever the bound may be reached: slow on long inputs.

    Args:
        x: [batch, time, heads, dim].
        log_a: logarithms of the decays, [batch, time, heads].
        B: [batch, time, groups, state].
        C: like B.
        max_norm: p; infinity for no bound.
        chunk_size: tokens that are looked at together, and done by one `ssd` if no state among them can reach p.
        initial_state: [batch, heads, state, dim]; zeros if None. It is not itself cut.

    Returns:
        ``(y, state)``: [batch, time, heads, dim], and the state after the last token, of norm p at most.

    Raises:
        ValueError: max_norm not above 0, chunk_size below 1, or shapes that don't go together.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected more than 0, got {max_norm}")
    check_count("chunk_size", chunk_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    heads = x.shape[2]
    if initial_state is None:
        initial_state = x.new_zeros((x.shape[0], heads, B.shape[3], x.shape[3]), dtype=wide)
    state, outputs = initial_state, []
    for chunk in zip(*(tensor.split(chunk_size, 1) for tensor in (x, log_a, B, C)), strict=True):
        with torch.no_grad():
            inputs = _norm(chunk[0]) * _norm(chunk[2]).repeat_interleave(heads // B.shape[2], 2)
            bounds, _ = linear_scan(chunk[1].to(wide).exp(), inputs, torch.linalg.vector_norm(state, dim=(2, 3)))
        if float(bounds.max()) <= max_norm:
            y, state = ssd(*chunk, initial_state=state)
            outputs.append(y)
            continue
        for x_t, log_a_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in chunk), strict=True):
            y, state = ssd_step(x_t, log_a_t, B_t, C_t, None, state)
            scale = 1 / (torch.linalg.vector_norm(state, dim=(2, 3)) / max_norm).clamp(min=1)
            state = state * scale[..., None, None]
            outputs.append((y * scale[..., None]).to(x.dtype)[:, None])
    return torch.cat(outputs, 1), state


def scaled_ssd(
    x: Float[Tensor, "batch time heads dim"],
    log_a: Float[Tensor, "batch time heads"],
    B: Float[Tensor, "batch time groups state"],
    C: Float[Tensor, "batch time groups state"],
    decay_scale: float = 1.0,
    input_scale: float = 1.0,
    *,
    initial_state: Float[Tensor, "batch heads state dim"] | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch heads state dim"]]:
    """The scan that forgets more and remembers less (4).

    Args:
        x: [batch, time, heads, dim].
        log_a: logarithms of the decays, [batch, time, heads].
        B: [batch, time, groups, state].
        C: like B.
        decay_scale: c_a; 0 forgets all but the present token.
        input_scale: c_b.
        initial_state: [batch, heads, state, dim]; zeros if None.

    Returns:
        ``(y, state)``: [batch, time, heads, dim], and the state after the last token.

    Raises:
        ValueError: a scale outside [0, 1], or shapes that don't go together.
    """
    check_probability("decay_scale", decay_scale)
    check_probability("input_scale", input_scale)
    shift = math.log(decay_scale) if decay_scale > 0 else -math.inf
    return ssd(x, log_a + shift, input_scale * B, C, initial_state=initial_state)


class MitigatedMamba2(nn.Module):
    """A trained block, run with another scan: ``MitigatedMamba2(block, partial(windowed_ssd, window=512))``.

    Args:
        block: its parameters are used, not copied.
        scan: from ``x, log_a, B, C`` and the keyword ``initial_state`` (None at first) to ``(y, state)``.
    """

    def __init__(self, block: Mamba2Block, scan: Scan) -> None:
        super().__init__()
        self.block, self.scan = block, scan

    def forward(
        self, u: Float[Tensor, "batch time d_model"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], MambaState]:
        """Runs over a sequence.

        Args:
            u: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state, whose ``ssm`` is that of the scan.

        Raises:
            ValueError: u or state has another shape.
        """
        block = self.block
        check_sequence(u, block.d_model, name="u")
        z, xBC, delta = block._project(u)
        window, ssm = (None, None) if state is None else state
        xBC, window = block._convolve(xBC, window, None)
        x, B, C = block._split(xBC)
        step_size, log_a = block._steps(delta)
        y, ssm = self.scan(block._scaled(x, step_size), log_a, B, C, initial_state=ssm)
        return block._finish(y, x, z), MambaState(window, ssm)

    def step(
        self, u_t: Float[Tensor, "batch d_model"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], MambaState]:
        """One token, [batch, d_model]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        if u_t.ndim != 2:
            raise ValueError(f"u_t: expected [batch, {self.block.d_model}], got shape {tuple(u_t.shape)}")
        y, state = self(u_t[:, None], state)
        return y[:, 0], state


class StateCollapseMonitor:
    """Runs a model over a sequence, and looks at the states of its Mamba-2 blocks now and then.

    Args:
        model: from ids and states to ``(logits, states)``, one `MambaState` a block, as `SequenceModel` is.
        every: tokens between two looks.

    Attributes:
        positions: tokens read at each look.
        states: for each look the state of each block, [batch, heads, state, dim].
    """

    def __init__(self, model: Callable[..., tuple[Tensor, tuple[MambaState, ...]]], every: int = 64) -> None:
        check_count("every", every)
        self.model, self.every = model, every
        self.positions: list[int] = []
        self.states: list[list[Tensor]] = []

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time classes"]:
        """The model's outputs for a sequence from its first token; forgets what it saw before.

        Args:
            ids: [batch, time].
        """
        self.positions, self.states = [], []
        outputs, carried = [], None
        for piece in ids.split(self.every, 1):
            logits, carried = self.model(piece, carried)
            outputs.append(logits)
            self.positions.append(piece.shape[1] + (self.positions[-1] if self.positions else 0))
            held = [state.ssm for state in carried]
            self.states.append([ssm.h if isinstance(ssm, WindowState) else ssm for ssm in held])
        return torch.cat(outputs, 1)

    def variance_by_channel(self) -> list[Float[Tensor, "looks heads dim"]]:
        """For each block the variance of the state over rows and the state axis, [looks, heads, dim]."""
        return [
            torch.stack([h.var(dim=(0, 2), correction=0) for h in looks]) for looks in zip(*self.states, strict=True)
        ]


def _chunks(tensor: Tensor, size: int) -> Tensor:
    """[batch, time, ...] -> [batch, chunks, size, ...], with zeros after the end (log decays of 0 change nothing)."""
    missing = -tensor.shape[1] % size
    return nn.functional.pad(tensor, (*[0, 0] * (tensor.ndim - 2), 0, missing)).unflatten(1, (-1, size))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.to(torch.promote_types(tensor.dtype, torch.float32)), dim=-1)
