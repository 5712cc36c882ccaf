r"""TTT layers: recurrent layers whose state is a small model that is trained on the sequence while it is read.

Paper: Learning to (Learn at Test Time): RNNs with Expressive Hidden States (arXiv:2407.04620).

The state is the weights of an inner model f, a linear map or an MLP with two layers. Each token gives one step of
gradient descent on a loss of self-supervision: predict one learned view of the token (the value) from another (the
key). What the layer gives is the prediction for a third view, the query. In mini-batches, whose gradients are all taken
at the weights before the first token, everything but the hand-over of the weights is matrix products.

Equation:
    For each head, with row vectors $q_t, k_t, v_t$ (sections 2.1 to 2.4 of the paper), and with t' the number of tokens
    before the mini-batch of token t, $t' = b \lfloor (t - 1) / b \rfloor$,
    $$ \ell(W; t) = \| f(k_t; W) - v_t \|^2, \qquad W_t = W_{t'} - \sum_{s=t'+1}^{t} \eta_s \nabla \ell(W_{t'}; s),
       \qquad z_t = f(q_t; W_t) \tag{1} $$
    For the linear f(x) = x W this is, for all tokens of a mini-batch together, the dual form (section 2.5)
    $$ Z = Q W_{t'} - \mathrm{tril}(Q K^\top)\, E, \qquad W_{t'+b} = W_{t'} - K^\top E, \qquad
       E = 2 \eta \odot (K W_{t'} - V) \tag{2} $$
    The layers (section 2.7) have biases in f, a residual connection, and a layer norm,
    $$ f(x) = x + \mathrm{LN}(x W_1 + b_1) \quad \text{or} \quad
       f(x) = x + \mathrm{LN}(\mathrm{gelu}(x W_1 + b_1) W_2 + b_2) \tag{3} $$
    for which (2) holds with the gradients of the loss with respect to each affine map's output in place of
    $2 (K W - V)$; a bias is a further key that is always 1. Through the norm $y = \gamma \hat z + \beta$ of d entries,
    with $e = \gamma \odot (y - \mathrm{target})$, half the loss has the gradient
    $$ \frac{1}{\sigma} \Big( e - \frac{1}{d} \sum_i e_i - \hat z \cdot \frac{1}{d} \sum_i e_i \hat z_i \Big) \tag{4} $$
    Rates are a function of the token, and steps are smaller the more tokens they sum over (authors' code):
    $$ 2 \eta_s = \frac{\eta_{base}}{d} \sigma(\theta \cdot x_s + \theta_0), \qquad
       W_t = W_{t'} - c_{t-t'} \sum_{s} \eta_s \nabla \ell(W_{t'}; s), \qquad
       c_i = \max(0, 1/i + \delta_i) \tag{5} $$

Symbols:
    x: [batch, time, d_model], the input.
    q, k, v: [batch, time, heads, d], linear in x; q and k are rotated by their place in the mini-batch (RoPE).
    W: [batch, heads, d, d], the weights; W_1 and W_2 [batch, heads, d, 4 d] and [batch, heads, 4 d, d].
    eta: [batch, time, heads], inner step sizes.
    delta: [mini_batch], learned, 0 at first; c scales the sum of gradients.
    E: [batch, time, heads, d], gradients with respect to the output of the affine map, times step sizes.

Defaults:
    mini_batch: 16, b (section 2.4).
    eta_base: 1 for TTTLinear, 0.1 for TTTMLP (section 2.7).
    hidden width of the inner MLP: 4 d (section 2.7).
    initial weights: normal with deviation 0.02, biases 0 (authors' code).

Deviations:
    1. c and the division by d of (5) are in the authors' code and not in section 2 of the paper.
    2. The loss of (1) has no factor 1/2. The authors' code takes the gradients of half of it, hence 2 eta in (5).
    3. The layers are those for the Transformer's block (post-norm, no gate, no convolution); q and k have projections
       of their own.
    4. A sequence may be cut anywhere, also inside a mini-batch: the state has the sum of (5) so far. The authors' code
       raises there, unless it goes on one token at a time.

Reduces to:
    causal linear attention: (2) with W_0 = 0, eta = 1/2 and one mini-batch for the whole sequence.
    delta rule: (2) with b = 1 and beta = 2 eta; also TTTLinear with b = 1, without inner norm and residual connection,
        over keys with a 1 at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number, check_sequence
from mlreviews.common.layers import linear
from mlreviews.common.rotary import apply_rotary
from mlreviews_kernels.delta_rule import delta_rule

__all__ = ["TTTMLP", "TTTLinear", "TTTState", "affine_dual", "norm_loss_gradient", "ttt_linear_dual"]

EPS = 1e-6  # of both norms, in the authors' code


class TTTState(NamedTuple):
    """What a layer remembers of a sequence.

    Attributes:
        weights: of the inner model at the start of the mini-batch, W and b or W1, b1, W2 and b2, each
            [batch, heads, ...]; float32 for half-precision models.
        gradients: the sum of (5) over the tokens since, without c; as weights.
        position: how many tokens since, below mini_batch.
    """

    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    position: int


def ttt_linear_dual(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads dim_v"],
    W0: Float[Tensor, "batch heads dim dim_v"],
    eta: Float[Tensor, "batch time heads"],
    mini_batch: int = 16,
) -> tuple[Float[Tensor, "batch time heads dim_v"], Float[Tensor, "batch heads dim dim_v"]]:
    """Equation (1) for f(x) = x W in the dual form (2), by the delta-rule core.

    Args:
        q: queries, [batch, time, heads, dim].
        k: keys, of q's shape.
        v: values, [batch, time, heads, dim_v].
        W0: first weights, [batch, heads, dim, dim_v].
        eta: step sizes, [batch, time, heads].
        mini_batch: b, tokens whose gradients are taken at the same weights.

    Returns:
        ``(z, W)``: [batch, time, heads, dim_v], and the last weights. To go on from W, cut at a multiple of b.

    Raises:
        ValueError: shapes don't go together, or mini_batch below 1.
    """
    check_count("mini_batch", mini_batch)
    return delta_rule(q, k, v, 2 * eta, mini_batch=mini_batch, initial_state=W0)


def norm_loss_gradient(
    z: Float[Tensor, "*batch dim"],
    target: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "*#batch dim"],
    bias: Float[Tensor, "*#batch dim"],
) -> Float[Tensor, "*batch dim"]:
    """Equation (4), the gradient of half the squared distance of LN(z) from the target.

    Args:
        z: before the norm, [..., dim].
        target: what the norm's output should be, of z's shape.
        weight: gamma, [..., dim].
        bias: beta, [..., dim].
    """
    normed, std = _normed(z)
    error = weight * (weight * normed + bias - target)
    along = normed * (error * normed).mean(-1, keepdim=True)
    return (error - error.mean(-1, keepdim=True) - along) / std


def affine_dual(
    q: Float[Tensor, "batch heads time d_in"],
    k: Float[Tensor, "batch heads time d_in"],
    errors: Float[Tensor, "batch heads time d_out"],
    scale: Float[Tensor, " time"],
    parameters: tuple[Float[Tensor, "batch heads d_in d_out"], Float[Tensor, "batch heads 1 d_out"]],
    gradients: tuple[Float[Tensor, "batch heads d_in d_out"], Float[Tensor, "batch heads 1 d_out"]],
) -> tuple[Float[Tensor, "batch heads time d_out"], tuple[Tensor, Tensor]]:
    """The dual form (2) of an affine map over tokens of one mini-batch, heads before time, scaled by (5).

    Args:
        q: what the map is applied to, token t under the weights after token t.
        k: what it was applied to in the loss.
        errors: gradients with respect to its output for k, times step sizes.
        scale: c of (5) for these tokens.
        parameters: W and b before the mini-batch.
        gradients: sums for W and b over the tokens of the mini-batch before these.

    Returns:
        The map's outputs for q, and the sums after the last token.
    """
    (W, b), (dW, db) = parameters, gradients
    # The 1 is the product of the further key and query that stand for the bias.
    moved = q @ dW + db + (q @ k.mT + 1).tril() @ errors
    return q @ W + b - scale[:, None] * moved, (dW + k.mT @ errors, db + errors.sum(-2, keepdim=True))


class TTTLinear(nn.Module):
    """The layer whose inner model is linear, the first of (3). Parameters have the names of the authors' code.

    Args:
        d_model: size of input and output.
        n_heads: inner models, of d_model / n_heads inputs each, an even number.
        mini_batch: b.
        eta_base: highest inner step size, before the division by d of (5).
        inner_ln: whether the inner model has its layer norm.
        inner_residual: whether it has its residual connection.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, eta_base below 0, or an odd or broken number of inputs a head.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        mini_batch: int = 16,
        eta_base: float = 1.0,
        inner_ln: bool = True,
        inner_residual: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("d_model", d_model), ("n_heads", n_heads), ("mini_batch", mini_batch)):
            check_count(name, count)
        check_number("eta_base", eta_base, least=0.0)
        if d_model % (2 * n_heads):
            raise ValueError(f"d_model: expected a multiple of 2 n_heads = {2 * n_heads} (for RoPE), got {d_model}")
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, d_model // n_heads
        self.mini_batch, self.eta_base = mini_batch, eta_base
        self.inner_ln, self.inner_residual = inner_ln, inner_residual
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear(d_model, d_model, bias=False, generator=generator))
        self.o_proj: nn.Linear
        self.learnable_ttt_lr_weight = _normal(n_heads, 1, d_model, generator=generator)
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(n_heads, 1))
        self.learnable_token_idx = nn.Parameter(torch.zeros(mini_batch))
        if inner_ln:
            self.ttt_norm_weight = nn.Parameter(torch.ones(n_heads, self.head_dim))
            self.ttt_norm_bias = nn.Parameter(torch.zeros(n_heads, self.head_dim))
        self.post_norm = nn.LayerNorm(d_model, eps=EPS)
        self._add_inner_model(generator)

    def _add_inner_model(self, generator: torch.Generator | None) -> None:
        self.W1 = _normal(self.n_heads, self.head_dim, self.head_dim, generator=generator)
        self.b1 = nn.Parameter(torch.zeros(self.n_heads, 1, self.head_dim))

    def inner_parameters(self) -> tuple[Tensor, ...]:
        """The inner model's weights before the first token, learned by the outer loop."""
        return self.W1, self.b1

    def affine(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """The inner model without norm and residual connection, [batch, heads, time, d] to the same."""
        W, b = weights
        return x @ W + b

    def learn(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, state: TTTState
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Reads tokens of one mini-batch.

        Args:
            q: [batch, heads, time, d].
            k: of q's shape.
            v: of q's shape.
            rate: 2 eta, [batch, heads, time].
            scale: c of (5), [time].
            state: before the tokens.

        Returns:
            The affine part of the inner model for q, and the sums of gradients after the last token.
        """
        (W, b), (dW, db), _ = state
        errors = rate[..., None] * self._error(self.affine(k, (W, b)), k, v)
        return affine_dual(q, k, errors, scale, (W, b), (dW, db))

    def forward(
        self, x: Float[Tensor, "batch time d_model"], state: TTTState | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], TTTState]:
        """Runs over a sequence, mini-batch after mini-batch.

        Args:
            x: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token.

        Raises:
            ValueError: x or state has another shape.
        """
        check_sequence(x, self.d_model)
        state = self.initial_state(x.shape[0]) if state is None else self._checked(state, x.shape[0])
        q, k, v, rate = self.project(x, state.position)
        scale = self.token_scale()
        outputs, start = [], 0
        while start < x.shape[1]:
            stop = min(x.shape[1], start + self.mini_batch - state.position)
            now = slice(start, stop)
            end = state.position + stop - start
            z, gradients = self.learn(
                q[:, :, now], k[:, :, now], v[:, :, now], rate[..., now], scale[state.position : end], state
            )
            outputs.append(self._predicted(q[:, :, now], z))
            state, start = self._handed_over(TTTState(state.weights, gradients, end), scale[-1]), stop
        joined = torch.cat(outputs, 2).transpose(1, 2).flatten(2).to(x.dtype)
        return self.o_proj(self.post_norm(joined)), state

    def step(
        self, x_t: Float[Tensor, "batch d_model"], state: TTTState | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], TTTState]:
        """One token, [batch, d_model]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        if x_t.ndim != 2:
            raise ValueError(f"x_t: expected [batch, {self.d_model}], got shape {tuple(x_t.shape)}")
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def initial_state(self, batch: int) -> TTTState:
        """The state before the first token, for so many rows."""
        weights = tuple(_wide(p).expand(batch, *p.shape).clone() for p in self.inner_parameters())
        return TTTState(weights, tuple(map(torch.zeros_like, weights)), 0)

    def project(self, x: Tensor, position: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, [batch, heads, time, d], and 2 eta of (5), [batch, heads, time], in float32 at least.

        Args:
            x: [batch, time, d_model].
            position: place of the first token in its mini-batch, for the rotation.
        """
        heads = (self.n_heads, self.head_dim)
        q, k, v = (_wide(getattr(self, name)(x)).unflatten(-1, heads) for name in ("q_proj", "k_proj", "v_proj"))
        places = (position + torch.arange(x.shape[1], device=x.device)) % self.mini_batch
        speeds = 10000.0 ** (-torch.arange(0, self.head_dim, 2, device=x.device, dtype=q.dtype) / self.head_dim)
        q, k = (apply_rotary(part, places[:, None] * speeds, interleaved=True) for part in (q, k))
        logits = nn.functional.linear(x, self.learnable_ttt_lr_weight[:, 0], self.learnable_ttt_lr_bias[:, 0])
        rate = self.eta_base / self.head_dim * torch.sigmoid(_wide(logits).transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rate

    def token_scale(self) -> Float[Tensor, " mini_batch"]:
        """c of (5), for each place in a mini-batch."""
        delta = _wide(self.learnable_token_idx)
        count = torch.arange(1, self.mini_batch + 1, device=delta.device, dtype=delta.dtype)
        return (1 / count + delta).clamp(min=0)

    def predict(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """The inner model f of (3) under given weights.

        Args:
            x: queries or keys, [batch, heads, time, d].
            weights: as of `TTTState`.
        """
        return self._predicted(x, self.affine(x, weights))

    def _predicted(self, x: Tensor, z: Tensor) -> Tensor:
        if self.inner_ln:
            weight, bias = self._norm()
            z = weight * _normed(z)[0] + bias
        return x + z if self.inner_residual else z

    def _error(self, z: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Gradient of half the loss with respect to z, where f(k) is made of z."""
        target = v - k if self.inner_residual else v
        return norm_loss_gradient(z, target, *self._norm()) if self.inner_ln else z - target

    def _norm(self) -> tuple[Tensor, Tensor]:
        return _wide(self.ttt_norm_weight)[:, None], _wide(self.ttt_norm_bias)[:, None]

    def _handed_over(self, state: TTTState, scale: Tensor) -> TTTState:
        """After the last token of a mini-batch, the weights for the next one."""
        if state.position < self.mini_batch:
            return state
        weights = tuple(w - scale * g for w, g in zip(state.weights, state.gradients, strict=True))
        return TTTState(weights, tuple(map(torch.zeros_like, weights)), 0)

    def _checked(self, state: TTTState, batch: int) -> TTTState:
        shapes = [(batch, *p.shape) for p in self.inner_parameters()]
        for name, tensors in (("weights", state.weights), ("gradients", state.gradients)):
            found = [tuple(t.shape) for t in tensors]
            if found != shapes:
                raise ValueError(f"state: expected {name} of shapes {shapes}, got {found}")
        if not 0 <= state.position < self.mini_batch:
            raise ValueError(f"state: expected a position in [0, {self.mini_batch}), got {state.position}")
        return state

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, n_heads={self.n_heads}, mini_batch={self.mini_batch}, eta_base={self.eta_base}"


class TTTMLP(TTTLinear):
    """The layer whose inner model has two layers, the second of (3), 4 d wide.

    Args:
        d_model: as of `TTTLinear`, like all that follow.
        n_heads: inner models.
        mini_batch: b.
        eta_base: highest inner step size.
        inner_ln: whether there is the inner norm.
        inner_residual: whether there is the inner residual connection.
        generator: draws the weights.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        mini_batch: int = 16,
        eta_base: float = 0.1,
        inner_ln: bool = True,
        inner_residual: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, mini_batch, eta_base, inner_ln, inner_residual, generator=generator)

    def _add_inner_model(self, generator: torch.Generator | None) -> None:
        heads, dim, hidden = self.n_heads, self.head_dim, 4 * self.head_dim
        self.W1, self.b1 = _normal(heads, dim, hidden, generator=generator), nn.Parameter(torch.zeros(heads, 1, hidden))
        self.W2, self.b2 = _normal(heads, hidden, dim, generator=generator), nn.Parameter(torch.zeros(heads, 1, dim))

    def inner_parameters(self) -> tuple[Tensor, ...]:
        """W1, b1, W2 and b2 before the first token."""
        return self.W1, self.b1, self.W2, self.b2

    def affine(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Gelu(x W1 + b1) W2 + b2, heads before time."""
        W1, b1, W2, b2 = weights
        return _gelu(x @ W1 + b1) @ W2 + b2

    def learn(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale: Tensor, state: TTTState
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of the base class."""
        (W1, b1, W2, b2), (dW1, db1, dW2, db2), _ = state
        before = k @ W1 + b1
        hidden = _gelu(before)
        errors = rate[..., None] * self._error(hidden @ W2 + b2, k, v)
        inner_errors = torch.ops.aten.gelu_backward(errors @ W2.mT, before, approximate="tanh")
        z, first = affine_dual(q, k, inner_errors, scale, (W1, b1), (dW1, db1))
        z, second = affine_dual(_gelu(z), hidden, errors, scale, (W2, b2), (dW2, db2))
        return z, (*first, *second)


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def _normal(*shape: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(*shape, generator=generator))


def _normed(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z - mean) / sigma over the last axis, and sigma."""
    centred = z - z.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / std, std


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
