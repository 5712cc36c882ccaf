r"""Gated-LoRA MTP: mask tokens after the text make a language model guess the tokens to come, which it then checks.

Paper: Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential (arXiv:2507.11851).

A frozen model gets k mask tokens after its text; the state at the i-th of them predicts the token i places further on.
Low-rank corrections of its linear layers are trained for that, and switched on at mask tokens alone, so that at real
tokens the model stays what it was. A small head reads each mask's state together with the token guessed before it. The
guesses are checked by the model itself in the next pass, which has mask tokens as well, for the guesses after those.

Equation:
    $$ y_t = W x_t + g_t\, \frac{\alpha}{r} B A x_t, \qquad g_t = [\,t \text{ is a mask token}\,] \tag{1} $$
    $$ p(\hat x_{n+i+1} \mid \cdot) = \mathrm{softmax}\big(W_s\, \mathrm{MLP}([e(\hat x_{n+i});\, z_i])\big) \tag{2} $$
    $$ L = L_{\mathrm{head}}(z) + L_{\mathrm{sampler}} + \frac{1}{|M|} \sum_{m \in M}
       \frac{1}{d} \| z_m - \mathrm{sg}(z^{*}_m) \|^2 \tag{3} $$

Symbols:
    n: length of the text.
    z_i: [d_model], last hidden state at mask i, i = 1, ..., k; its target is token n + i + 1.
    z^*_m: last hidden state at the real token whose next token is the target of mask m.
    e: embedding.
    g: [batch, time], the gate.

Defaults:
    k: 8 (the paper's experiments).
    rank: 16 (ours, for small models).
    alpha: rank (ours).
    mode: "quadratic" (the paper's choice).

Deviations:
    1. The losses of equation (3) count mask tokens alone: at real tokens nothing can be trained.
    2. The squared distance is a mean over the d_model features, so that its weight doesn't hang on the model's size.
    3. Guesses are the likeliest tokens; drawn text keeps the model's law all the same, since the next token is drawn
       from the model and the guesses only tell which ones have been computed.

Reduces to:
    torch.nn.Linear: where the gate is closed, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count
from mlreviews.common.layers import linear
from mlreviews.decoding.trees import Drafted, Found, TokenTree, decode_trees, exact_verdicts
from mlreviews.models import GenerationResult, LMOutput, Sampler
from mlreviews_kernels.tree_masked_attention import ancestor_mask

__all__ = [
    "GatedLoRALinear",
    "MTPBatch",
    "MTPLosses",
    "MTPSampler",
    "MaskTokenLM",
    "latent_consistency_loss",
    "mtp_generate",
    "mtp_loss",
    "mtp_training_batch",
]

IGNORED = -100  # target of what isn't trained, as torch.nn.functional.cross_entropy has it


class _Gate:
    """Which tokens of the pass that runs are mask tokens; one for all layers of a model."""

    def __init__(self) -> None:
        self.open: Tensor | None = None


class GatedLoRALinear(nn.Module):
    """A frozen linear layer with a low-rank correction where the gate is open, equation (1).

    Args:
        base: the layer; it is frozen.
        rank: of the correction.
        alpha: scale of the correction, times 1 / rank; None is the rank.
        shared: where the gate of the pass stands that runs, for layers inside a model.
        generator: draws A; None is the global one. B is zero.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        shared: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("rank", rank)
        self.base, self.shared = base.requires_grad_(False), shared
        self.scale = (rank if alpha is None else alpha) / rank
        down = linear(base.in_features, rank, bias=False, generator=generator).to(base.weight)
        self.lora_A = nn.Parameter(down.weight.detach().clone())
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(
        self, x: Float[Tensor, "*batch in_features"], gate: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch out_features"]:
        """The layer's output, to the bit, where the gate is closed.

        Args:
            x: [..., in_features].
            gate: [...]; None is the shared one, closed where there is none.
        """
        y: Tensor = self.base(x)
        if gate is None:
            gate = None if self.shared is None else self.shared.open
        if gate is None:
            return y
        correction = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)
        return torch.where(gate[..., None], y + self.scale * correction, y)


class _MaskEmbedding(nn.Module):
    """A frozen embedding, and vectors for the ids after its own; says which are which."""

    def __init__(self, base: nn.Embedding, k: int, shared: _Gate, generator: torch.Generator | None) -> None:
        super().__init__()
        self.base, self.shared = base.requires_grad_(False), shared
        size = base.weight.detach().std()
        self.masks = nn.Parameter(size * torch.randn(k, base.embedding_dim, generator=generator).to(base.weight))

    @property
    def weight(self) -> Tensor:
        """The embedding's own matrix, without the mask tokens."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        vocab = self.base.num_embeddings
        gate = ids >= vocab
        self.shared.open = gate
        mask = self.masks[(ids - vocab).clamp(min=0)]
        return torch.where(gate[..., None], mask, self.base(ids.clamp(max=vocab - 1)))


class MaskTokenLM(nn.Module):
    """A frozen language model that knows k mask tokens, ids vocab_size to vocab_size + k - 1. It is a `CausalLM`.

    Args:
        model: any `mlreviews.models.CausalLM` of linear layers; a copy is taken.
        k: how many mask tokens.
        rank: of the corrections.
        alpha: as of `GatedLoRALinear`.
        generator: draws what is trained; None is the global one.

    Raises:
        ValueError: a number below 1.
        TypeError: the model's embedding isn't a `torch.nn.Embedding`, or it has no linear layers.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int = 8,
        *,
        rank: int = 16,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("k", k)
        check_count("rank", rank)
        self.k = k
        self.model: Any = copy.deepcopy(model).requires_grad_(False)
        own, gate = self.model.embed_tokens, _Gate()
        if not isinstance(own, nn.Embedding):
            raise TypeError(f"model: expected an nn.Embedding, got {type(own).__name__}")
        made: dict[nn.Module, nn.Module] = {own: _MaskEmbedding(own, k, gate, generator)}
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and module is not self.model.lm_head:
                made[module] = GatedLoRALinear(module, rank, alpha=alpha, shared=gate, generator=generator)
        if len(made) == 1:
            raise TypeError("model: expected linear layers besides the head, got none")
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if child in made:
                    setattr(parent, name, made[child])

    @property
    def vocab_size(self) -> int:
        """Number of ids of real tokens."""
        return int(self.model.vocab_size)

    @property
    def max_length(self) -> int | None:
        """How many tokens the model can see."""
        found: int | None = self.model.max_length
        return found

    @property
    def embed_tokens(self) -> Any:
        """From ids, those of mask tokens too, to vectors."""
        return self.model.embed_tokens

    @property
    def norm(self) -> Any:
        """The model's last norm."""
        return self.model.norm

    @property
    def lm_head(self) -> Any:
        """The model's head."""
        return self.model.lm_head

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        cache: Any = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*rows time"] | None = None,
        tree: Bool[Tensor, "*trees time time"] | None = None,
        hidden_states: bool = False,
    ) -> LMOutput:
        """Runs over real and mask tokens; arguments as of `mlreviews.models.TinyLM.forward`."""
        out: LMOutput = self.model(ids, cache, mask=mask, positions=positions, tree=tree, hidden_states=hidden_states)
        return out


class MTPSampler(nn.Module):
    """The head of equation (2): two layers, each linear, SiLU and LayerNorm, then logits.

    Args:
        d_model: size of a hidden state and of an embedding.
        vocab_size: number of ids.
        generator: draws the weights; None is the global one.
    """

    def __init__(self, d_model: int, vocab_size: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_count("vocab_size", vocab_size)
        self.layers = nn.ModuleList(linear(size, d_model, generator=generator) for size in (2 * d_model, d_model))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.out = linear(d_model, vocab_size, bias=False, generator=generator)

    def forward(
        self, z: Float[Tensor, "*batch d_model"], previous: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch vocab"]:
        """Logits of the token that a mask stands for.

        Args:
            z: [..., d_model], last hidden state at the mask.
            previous: [..., d_model], embedding of the token before.
        """
        x = torch.cat([previous, z], -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(nn.functional.silu(layer(x)))
        logits: Tensor = self.out(x)
        return logits


class MTPBatch(NamedTuple):
    """Texts with k mask tokens after each of their tokens, to be run over in one pass.

    Attributes:
        ids: [batch, time * (k + 1)], each token followed by its masks.
        positions: [time * (k + 1)], of a mask those of the token it stands for.
        tree: [time * (k + 1), time * (k + 1)], what each sees: tokens those before, masks their text and their block.
        gate: [time * (k + 1)], True at masks.
        targets: [batch, time * (k + 1)], what each is to predict; -100 beyond the text.
        anchors: [time * (k + 1)], the place of the token with the same target; its own place beyond the text.
    """

    ids: Int[Tensor, "batch packed"]
    positions: Int[Tensor, " packed"]
    tree: Bool[Tensor, "packed packed"]
    gate: Bool[Tensor, " packed"]
    targets: Int[Tensor, "batch packed"]
    anchors: Int[Tensor, " packed"]


def mtp_training_batch(ids: Int[Tensor, "batch time"], k: int, vocab_size: int) -> MTPBatch:
    """Packs all beginnings of a text, each with its masks, into one pass.

    Args:
        ids: [batch, time].
        k: masks after each token.
        vocab_size: id of the first mask token.

    Raises:
        ValueError: k below 1, or no token.
    """
    check_count("k", k)
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"ids: expected [batch, time] with no empty axis, got shape {tuple(ids.shape)}")
    batch, time = ids.shape
    text, block = torch.arange(time, device=ids.device)[:, None], torch.arange(k + 1, device=ids.device)
    masks = (vocab_size - 1 + block[1:]).expand(batch, time, k)
    packed = torch.cat([ids[:, :, None], masks], 2).flatten(1)
    positions = (text + block).flatten()
    parents = text * (k + 1) + block - 1  # a mask's parent is the place before it,
    parents[:, 0] = (text[:, 0] - 1) * (k + 1)  # a token's is the token before it
    parents[0, 0] = -1
    inside = positions + 1 < time
    targets = ids[:, (positions + 1).clamp(max=time - 1)].masked_fill(~inside, IGNORED)
    anchors = torch.where(inside, positions * (k + 1), torch.arange(len(positions), device=ids.device))
    gate = (block > 0).expand(time, -1).flatten()
    return MTPBatch(packed, positions, ancestor_mask(parents.flatten()), gate, targets, anchors)


def latent_consistency_loss(
    z: Float[Tensor, "*batch d_model"], anchor: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch"]:
    """The last term of equation (3) for each mask; no gradient reaches the anchor.

    Args:
        z: [..., d_model], last hidden states at masks.
        anchor: [..., d_model], those at the real tokens with the same targets.
    """
    return (z - anchor.detach()).square().mean(-1)


class MTPLosses(NamedTuple):
    """Equation (3) and its terms, means over the masks that have a target.

    Attributes:
        total: their sum.
        head: cross-entropy of the model's own head, in nats.
        sampler: cross-entropy of the sampler, in nats.
        consistency: distance of hidden states.
    """

    total: Float[Tensor, ""]
    head: Float[Tensor, ""]
    sampler: Float[Tensor, ""]
    consistency: Float[Tensor, ""]


def mtp_loss(lm: MaskTokenLM, sampler: MTPSampler, ids: Int[Tensor, "batch time"]) -> MTPLosses:
    """Equation (3) over texts.

    Args:
        lm: whose corrections and mask tokens are trained.
        sampler: is trained.
        ids: [batch, time], three tokens or more.

    Raises:
        ValueError: no mask has a target.
    """
    if ids.ndim != 2 or ids.shape[1] < 3:
        raise ValueError(f"ids: expected [batch, 3 tokens or more], got shape {tuple(ids.shape)}")
    packed = mtp_training_batch(ids, lm.k, lm.vocab_size)
    out = lm(packed.ids, positions=packed.positions, tree=packed.tree, hidden_states=True)
    assert out.hidden_states is not None
    z = out.hidden_states[-1]
    counted = (packed.gate & (packed.targets[0] != IGNORED)).nonzero()[:, 0]
    targets = packed.targets[:, counted]
    previous = lm.embed_tokens(ids[:, packed.positions[counted]])  # the token before a mask's target
    logits = out.logits[:, counted], sampler(z[:, counted], previous)
    head, drawn = (nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten()) for x in logits)
    consistency = latent_consistency_loss(z[:, counted], z[:, packed.anchors[counted]]).mean()
    return MTPLosses(head + drawn + consistency, head, drawn, consistency)


class _Recorder:
    """The model as `decode_trees` sees it; keeps the last hidden states of a pass."""

    def __init__(self, lm: MaskTokenLM) -> None:
        self.lm, self.hidden = lm, torch.empty(0)
        self.embed_tokens, self.norm, self.lm_head = lm.embed_tokens, lm.norm, lm.lm_head
        self.vocab_size, self.max_length = lm.vocab_size, lm.max_length

    def __call__(self, ids: Tensor, cache: Any = None, **layout: Any) -> LMOutput:  # arguments of the model
        out: LMOutput = self.lm(ids, cache, **layout)
        assert out.hidden_states is not None
        self.hidden = out.hidden_states[-1]
        return out


class _Guesser:
    """Drafts the trees of `decode_trees`: a chain of guesses, and mask tokens after its end or after each token."""

    def __init__(
        self, lm: _Recorder, head: MTPSampler, k: int, quadratic: bool, sampler: Sampler, generator: Any
    ) -> None:
        self.lm, self.head, self.k, self.quadratic = lm, head, k, quadratic
        self.rule = exact_verdicts(sampler, generator)
        self.height = k
        self.guesses: list[list[int]] = []  # of each row, k or none
        self.offered: list[list[int]] = []

    def __call__(
        self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor, height: int
    ) -> Drafted:
        """See `mlreviews.decoding.trees.TreeDrafter`."""
        roots = following[:, -1].tolist()
        chains = [guess[:height] for guess in self.guesses] or [[] for _ in roots]
        self.offered.append(list(map(len, chains)))
        longest = max(map(len, chains))
        masks = list(range(self.lm.vocab_size, self.lm.vocab_size + self.k))
        tokens, parents = [], []
        self.chains = chains
        for root, chain in zip(roots, chains, strict=True):
            # a row without guesses gets any tokens, so that all trees have the same size; its masks follow the root
            tokens.append([root, *chain, *[root] * (longest - len(chain))])
            parents.append([-1, *range(longest)])
            for node in range(longest + 1) if self.quadratic else [len(chain)]:
                start = len(tokens[-1])
                tokens[-1] += masks
                parents[-1] += [node, *range(start, start + self.k - 1)]
        self.first = longest + 1  # where masks begin
        shape = parents if len(parents) > 1 else parents[0]
        return Drafted(following.new_tensor(tokens), TokenTree.of(following.new_tensor(shape)))

    def verdicts(self, logits: Tensor, drafted: Drafted, previous: Tensor | None) -> Found:
        """See `mlreviews.decoding.trees.Verdicts`; guesses what follows what is accepted, too."""
        if drafted.tokens.shape[1] == 1:
            self.offered.append([0] * len(drafted.tokens))
            return self.rule(logits, drafted, previous)
        if previous is not None:  # mask tokens are no tokens that could be repeated
            previous = previous.masked_fill(previous >= self.lm.vocab_size, -1)
        found = self.rule(logits, drafted, previous)
        ends = [path[-1] for path, _ in found]
        blocks = ends if self.quadratic else [0] * len(ends)
        known = [self.quadratic or end == len(chain) for end, chain in zip(ends, self.chains, strict=True)]
        index = torch.tensor([[self.first + block * self.k + i for i in range(self.k)] for block in blocks])
        guesses = self._guess(index.to(logits.device), torch.tensor([token for _, token in found]).to(logits.device))
        self.guesses = [guess if know else [] for guess, know in zip(guesses, known, strict=True)]
        return found

    def _guess(self, index: Tensor, token: Tensor) -> list[list[int]]:
        """Equation (2), token by token, from the states at the masks [batch, k] and the token before."""
        z = self.lm.hidden.gather(1, index[..., None].expand(-1, -1, self.lm.hidden.shape[2]))
        guesses = []
        for i in range(self.k):
            token = self.head(z[:, i], self.lm.embed_tokens(token[:, None])[:, 0]).argmax(-1)
            guesses.append(token)
        found: list[list[int]] = torch.stack(guesses, 1).tolist()
        return found


@torch.no_grad()
def mtp_generate(
    lm: MaskTokenLM,
    head: MTPSampler,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    mode: Literal["quadratic", "linear"] = "quadratic",
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
) -> GenerationResult:
    """Continues each row of a batch with the frozen model's law, in fewer passes where guesses are right.

    Args:
        lm: the model with its mask tokens.
        head: guesses from their states.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row, 0 or more.
        mode: "quadratic" has masks after each guess, so that there are k guesses whatever is accepted; "linear" after
            the last one alone, so that after a refusal there are none for one pass.
        sampler: from logits to the distribution; the default is greedy.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws tokens; None is the global one.
        stop_tokens: ids that end a row.

    Returns:
        The new tokens; `accepted` and `drafted` count guesses.

    Raises:
        ValueError: no such mode, or as of `mlreviews.models.generate`.
        TypeError: ids are not int64.
    """
    if mode not in ("quadratic", "linear"):
        raise ValueError(f"mode: expected 'quadratic' or 'linear', got {mode!r}")
    recorder = _Recorder(lm)
    guesser = _Guesser(recorder, head, lm.k, mode == "quadratic", sampler, generator)
    found = decode_trees(
        recorder,
        guesser,
        guesser.verdicts,
        input_ids,
        max_new_tokens,
        sampler=sampler,
        mask=mask,
        generator=generator,
        stop_tokens=stop_tokens,
    )
    if found.drafted is None or not guesser.offered:
        return found
    offered = torch.tensor(guesser.offered).masked_fill(found.drafted < 0, -1)
    return found._replace(drafted=offered)
