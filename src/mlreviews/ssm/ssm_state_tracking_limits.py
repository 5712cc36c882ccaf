r"""State-tracking limits of SSMs: commuting transitions can't compose permutations, input-dependent matrices can.

Paper: The Illusion of State in State-Space Models (arXiv:2404.08819).
Paper: Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (arXiv:2411.12537).
Paper: The Expressive Limits of Diagonal SSMs for State-Tracking (arXiv:2603.01959).

A recurrent layer looks as if it kept track of a state. But where the transitions are diagonal (Mamba) or the same for
every input (S4), their products commute, and the layer computes nothing that a circuit of constant depth could not
(theorems 4.2 and 4.4). The test is the word problem of a group: given elements one by one, say their product so far. In
A5, which is not solvable, it is as hard as any sequential computation with a finite memory. Two changes let one layer
solve it (theorems 5.1 and 5.2): a nonlinearity in the recurrence (RNN-SSM), or a transition matrix that depends on the
input (IDS4, a weighted finite automaton). Word problems are drawn by `mlreviews.datasets`.

Equation:
    $$ h_t = A(x_t)\, h_{t-1} + B x_t, \qquad y_t = C h_t + D x_t \tag{1} $$
    $$ \text{full: } A(x) = \operatorname{mat}(W x + w), \quad
       \text{diag: } \operatorname{diag}(\tanh(W x + w)), \quad
       \text{positive: } \operatorname{diag}(\sigma(W x + w)), \quad
       \text{fixed: } \operatorname{diag}(\tanh w) \tag{2} $$
    Steps compose, and composition is associative, so that a tree of matrix products gives all states in logarithmic
    depth:
    $$ (A_2, b_2) \circ (A_1, b_1) = (A_2 A_1,\; A_2 b_1 + b_2) \tag{3} $$
    The word problem is solved without training by permutation matrices: with
    $$ (A(g)\, h)_i = h_{g(i)} \quad\text{the state after } g_1, \dots, g_t \text{ is}\quad
       (h_t)_i = (h_0)_{g_1 g_2 \cdots g_t (i)} \tag{4} $$
    which tells every product apart when the entries of the initial state are distinct.
    $$ h_t = f(R\, h_{t-1} + B x_t) \tag{5} $$
    is the RNN-SSM; with ReLU it selects among copies of the state, which solves the same word problems:
    $$ u_{ij} = \max\Bigl(\sum\nolimits_k u_{jk} - n\,[g(i) \ne j],\, 0\Bigr), \qquad
       h_i = \sum\nolimits_j u_{ij} \tag{6} $$
    On a constant input the state of "positive" moves ever less and never turns back, whatever B and C:
    $$ h_{t+1} - h_t = \operatorname{diag}(a)^t\, (h_1 - h_0), \qquad 0 < a < 1 \tag{7} $$
    Parity (the word problem of Z2) asks for a state that alternates on the input 1, 1, 1, ..., which the entry
    a(1) = -1 gives: "diag" can express it, "positive" can't. With B = 0 neither can tell $g_1 g_2$ from $g_2 g_1$.

Symbols:
    x: [batch, time, d_in], the input.
    y: [batch, time, d_out], the output.
    h: [batch, d_state], the state; h_0 is a learned parameter unless a state is passed in.
    A: [batch, time, d_state, d_state], transition matrices; a is their diagonal.
    B, C, D: [d_state, d_in], [d_out, d_state], [d_out, d_in].
    g: an element of the group, a permutation of n points, numbered from 0, the identity.
    u: [batch, n * n], the state of eq. (6), units (i, j).

Defaults:
    mode: "full", the paper's IDS4 (section 5.2).
    initialisation of A: around the identity (section 6, where the deviations are normal; here W is uniform as in
        torch.nn.Linear and mat(w) the identity); entries of w uniform in [-2, 2] for diagonal modes (ours).
    activation: tanh (ours; section 5.1 takes the sign, which has no gradient).

Deviations:
    1. B, C and D don't depend on the input, so that modes differ in A alone. Mamba's B and C do.
    2. Diagonals are real; S4's are complex. Complex entries are 2 x 2 rotations, which "full" contains. Those commute
       as well: in one layer they solve the word problems of abelian groups, such as Z60, and no others
       (arXiv:2603.01959). Real ones can't even count modulo 3 (arXiv:2411.12537, theorem 2).
    3. The initial state is learned, as in a weighted automaton, where the paper puts a token before the sequence.

Reduces to:
    torch.nn.RNN: the states of RNNSSM with activation tanh or ReLU, from the same initial state.
    torch.nn.functional.conv1d: mode "fixed" from a zero state, with the kernel C diag(a)^k B (and D at k = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count
from mlreviews.common.matrix_scan import matrix_scan
from mlreviews.datasets import group_permutations
from mlreviews_kernels.arguments import check_shape
from mlreviews_kernels.linear_scan import linear_scan

__all__ = ["RNNSSM", "InputDependentSSM", "word_problem_rnn", "word_problem_ssm"]

Mode = Literal["full", "diag", "positive", "fixed"]

_MODES = ("full", "diag", "positive", "fixed")


class _Recurrent(nn.Module):
    """What both layers share: sizes, B, C, D, the initial state, and how to run over a sequence or one input."""

    def __init__(self, d_in: int, d_state: int, d_out: int | None, bias: bool) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        for name, size in (("d_in", d_in), ("d_state", d_state), ("d_out", d_out)):
            check_count(name, size)
        self.d_in, self.d_state, self.d_out = d_in, d_state, d_out
        self.initial_state = nn.Parameter(torch.randn(d_state) / d_state**0.5)
        self.B = nn.Linear(d_in, d_state, bias=bias)
        self.C = nn.Linear(d_state, d_out, bias=False)
        self.D = nn.Linear(d_in, d_out, bias=False)

    def forward(
        self, x: Float[Tensor, "batch time d_in"], state: Float[Tensor, "batch d_state"] | None = None
    ) -> tuple[Float[Tensor, "batch time d_out"], Float[Tensor, "batch d_state"]]:
        """Runs over a sequence.

        Args:
            x: [batch, time, d_in].
            state: [batch, d_state], what an earlier call returned; None is the learned initial state.

        Returns:
            ``(y, state)``, [batch, time, d_out] and [batch, d_state], the state after the last input.

        Raises:
            ValueError: x or the state has another shape.
        """
        if x.ndim != 3 or x.shape[2] != self.d_in or x.numel() == 0:
            raise ValueError(f"x: expected [batch, time, {self.d_in}] with no empty axis, got shape {tuple(x.shape)}")
        if state is None:
            state = self.initial_state.expand(len(x), -1)
        check_shape("state", state, (len(x), self.d_state), "[batch, d_state]")
        states, last = self._states(x, state)
        return self.C(states) + self.D(x), last.to(x.dtype)

    def step(
        self, x: Float[Tensor, "batch d_in"], state: Float[Tensor, "batch d_state"] | None = None
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, "batch d_state"]]:
        """One input, [batch, d_in]: ``(y, state)`` as ``forward`` gives them for a sequence of length 1."""
        if x.ndim != 2:
            raise ValueError(f"x: expected [batch, {self.d_in}], got shape {tuple(x.shape)}")
        y, state = self(x[:, None], state)
        return y[:, 0], state

    def _states(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The sizes."""
        return f"d_in={self.d_in}, d_state={self.d_state}, d_out={self.d_out}"


class InputDependentSSM(_Recurrent):
    """One state-space layer, eq. (1), whose transition is one of eq. (2).

    Args:
        d_in: size of the input.
        d_state: size of the state.
        d_out: size of the output; None is d_in.
        mode: "full" (IDS4), "diag" (entries in (-1, 1)), "positive" (entries in (0, 1), as Mamba's), or "fixed" (a
            diagonal that does not depend on the input, as in S4).

    Raises:
        ValueError: a size below 1, or an unknown mode.
    """

    def __init__(self, d_in: int, d_state: int, d_out: int | None = None, mode: Mode = "full") -> None:
        super().__init__(d_in, d_state, d_out, bias=False)
        if mode not in _MODES:
            raise ValueError(f"mode: expected one of {', '.join(_MODES)}, got {mode!r}")
        self.mode = mode
        bias = torch.eye(d_state).flatten() if mode == "full" else torch.empty(d_state).uniform_(-2, 2)
        if mode == "fixed":
            self.transition_bias = nn.Parameter(bias)
        else:
            self.transition = nn.Linear(d_in, len(bias))
            self.transition.bias = nn.Parameter(bias)

    def transitions(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_state ..."]:
        """A(x) of eq. (2): [..., d_state, d_state] in mode "full", else its diagonal, [..., d_state]."""
        if self.mode == "fixed":
            return self.transition_bias.tanh().expand(*x.shape[:-1], -1)
        entries: Tensor = self.transition(x)
        if self.mode == "full":
            return entries.unflatten(-1, (self.d_state, self.d_state))
        return entries.tanh() if self.mode == "diag" else entries.sigmoid()

    def _states(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        scan, transitions = matrix_scan if self.mode == "full" else linear_scan, self.transitions(x)
        return scan(transitions, self.B(x).to(transitions.dtype), state)  # autocast may have left only one in float32

    def extra_repr(self) -> str:
        """Sizes and mode."""
        return f"{super().extra_repr()}, mode={self.mode}"


class RNNSSM(_Recurrent):
    """One layer with a nonlinearity in the recurrence, eq. (5); it can only be run step by step.

    Args:
        d_in: size of the input.
        d_state: size of the state.
        d_out: size of the output; None is d_in.
        activation: f, elementwise.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, d_in: int, d_state: int, d_out: int | None = None, activation: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        super().__init__(d_in, d_state, d_out, bias=True)
        self.activation = activation
        self.R = nn.Linear(d_state, d_state, bias=False)

    def _states(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        for inflow in self.B(x).unbind(1):
            state = self.activation(self.R(state) + inflow)
            states.append(state)
        return torch.stack(states, dim=1), state


def word_problem_ssm(group: str) -> InputDependentSSM:
    """The layer of eq. (4): it solves the word problem of a group exactly, at any length, without training.

    Args:
        group: as for `group_permutations`.

    Returns:
        A layer in mode "full" from one-hot tokens [batch, time, order] to scores [batch, time, order]; the highest is
        that of the prefix product. All numbers are whole, and exact in float32 for up to 300 points.

    Raises:
        ValueError: not a group's name.
    """
    permutations = group_permutations(group)
    order, points = permutations.shape
    layer = InputDependentSSM(order, points, order)
    values = torch.arange(1.0, points + 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.transition.weight.copy_(nn.functional.one_hot(permutations, points).flatten(1).T)
        layer.initial_state.copy_(values)
        # All states are rearrangements of the same numbers, so the one with the largest inner product is the state.
        layer.C.weight.copy_(values[permutations])
    return layer


def word_problem_rnn(group: str) -> RNNSSM:
    """The layer of eq. (6), which does the same with ReLU in place of a transition that depends on the input.

    Args:
        group: as for `group_permutations`; n points take n * n units, so write ``"Z3xZ4xZ5"`` rather than ``"Z60"``.

    Returns:
        A layer from one-hot tokens to scores, as of `word_problem_ssm`.

    Raises:
        ValueError: not a group's name.
    """
    permutations = group_permutations(group)
    order, points = permutations.shape
    layer = RNNSSM(order, points**2, order, torch.relu)
    values = torch.arange(1.0, points + 1)
    same = torch.eye(points)
    with torch.no_grad():
        layer.initial_state.copy_((same * values).flatten())
        # Unit (i, j) gets the sum over all units (j, k) ...
        layer.R.weight.copy_(torch.einsum("jl,k->jlk", same, torch.ones(points)).flatten(1).repeat(points, 1))
        # ... which is at most n, unless g(i) = j.
        layer.B.weight.copy_(points * nn.functional.one_hot(permutations, points).flatten(1).T)
        layer.B.bias.fill_(-points)
        layer.C.weight.copy_(values[permutations].repeat_interleave(points, dim=1))
        layer.D.weight.zero_()
    return layer
