r"""LoRA: a frozen weight and a trained low-rank product beside it; with rsLoRA, DoRA and LoRA+.

Paper: LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
Paper: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (arXiv:2312.03732).
Paper: DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353).
Paper: LoRA+: Efficient Low Rank Adaptation of Large Models (arXiv:2402.12354).

The weight of a trained model stays as it is, and a product of two thin matrices is learned beside it, of which one
begins at zero. It is added to the weight when training is over, so that inference costs nothing. rsLoRA scales it so
that high ranks learn as fast as low ones, DoRA learns the length of each of the weight's rows by itself, and LoRA+
gives the matrix that begins at zero a larger step size.

Equation:
    $$ y = W_0 x + \gamma\, B A\, x, \qquad \gamma = \frac{\alpha}{r} \tag{1} $$
    $$ \gamma = \frac{\alpha}{\sqrt r} \quad \text{(rsLoRA)} \tag{2} $$
    $$ y = m \odot \frac{(W_0 + \gamma B A)\, x}{\lVert W_0 + \gamma B A \rVert_\text{row}}
       \quad \text{(DoRA)} \tag{3} $$
    The norm in eq. (3) is that of each row of the weight, over all inputs; no gradient goes through it (section 4.3).
    $$ \eta_B = \lambda\, \eta_A \quad \text{(LoRA+)} \tag{4} $$

Symbols:
    x: [*batch, in_features], the layer's input; y: [*batch, out_features].
    W_0: [out_features, in_features], frozen.
    A: [rank, in_features], Kaiming-uniform at first; B: [out_features, rank], 0 at first.
    m: [out_features], at first the rows' norms.
    alpha: a number; with Adam it acts like a step size.
    eta_A, eta_B: step sizes of A and of B.

Defaults:
    rank: 8 (section 7.2 finds little gain above).
    alpha: 16 (ours; twice the rank, as is usual).
    ratio of step sizes: 16 (LoRA+, section 4).

Deviations:
    1. The paper draws A from a normal distribution; its code, and this one, from the Kaiming-uniform one.
    2. An embedding has its zeros in A and its normal numbers in B, as in the authors' code: the rows of A that a batch
       selects are then those that learn. LoRA+ gives neither a larger step size.
    3. A convolution's A is a convolution to rank channels, its B one of width 1, as in the peft library. With groups,
       the product is formed and used as a weight.
    4. Dropout acts on the input of A alone, with DoRA, too.

Reduces to:
    torch.nn.Linear: at the start, and with no adapter active.
    full fine-tuning: rank of min(in_features, out_features), as to what can be represented.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mlreviews.common.adapter import (
    PEFT_FORMATS,
    Adapter,
    PeftFormat,
    adapters,
    features,
    inject,
    is_transposed,
    matching_layers,
    trainable_parameters,
)
from mlreviews.common.checks import check_count, check_number, check_probability

__all__ = [
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASettings",
    "inject_lora",
    "lora_plus_groups",
    "set_active",
]


@dataclass(frozen=True)
class LoRASettings:
    """What is particular to one low-rank adapter.

    Attributes:
        rank: r.
        alpha: of eq. (1).
        dropout: probability for each input of A, in training.
        rslora: whether the scale is that of eq. (2).
        dora: whether eq. (3) holds.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_number("alpha", self.alpha)
        check_probability("dropout", self.dropout)

    @property
    def scaling(self) -> float:
        """The scale gamma."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoRA(Adapter):
    """What the three kinds of layers share. A layer can have several adapters by name, which act together.

    Args:
        base: the layer.
        rank: r.
        alpha: of eq. (1).
        dropout: probability for each input of A, in training.
        rslora: whether the scale is that of eq. (2).
        dora: whether eq. (3) holds.
        name: of this first adapter; `add` gives the layer others.
        generator: draws the weights and, in training, what is dropped; None is the global one.
    """

    peft_type: ClassVar[str | None] = "LORA"
    # names in the files of the peft library
    stored: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        name: str = "default",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        self.settings: dict[str, LoRASettings] = {}
        self.active: dict[str, float] = {}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude = nn.ParameterDict()
        self.generator = generator
        self.add(name, LoRASettings(rank, alpha, dropout, rslora, dora), generator=generator)
        self.set_active({name: 1.0})

    def add(self, name: str, settings: LoRASettings, *, generator: torch.Generator | None = None) -> None:
        """Adds another adapter, which changes nothing as long as `set_active` doesn't name it.

        Args:
            name: a new one, without dots.
            settings: of the adapter.
            generator: draws A; None is the global one.

        Raises:
            ValueError: the name is taken or has a dot.
            RuntimeError: the layer is merged.
        """
        if name in self.settings or not name or "." in name:
            raise ValueError(f"name: expected a new one without dots, got {name!r} beside {list(self.settings)}")
        self._check_unmerged()
        shape_a, shape_b = self._shapes(settings.rank)
        weight = self.base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (torch.zeros(shape, dtype=dtype, device=weight.device) for shape in (shape_a, shape_b))
        self._draw(a, b, generator)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(a), nn.Parameter(b)
        self.settings[name] = settings
        if settings.dora:
            self.lora_magnitude[name] = nn.Parameter(self._norms(name))

    def take(self, other: LoRA, name: str) -> None:
        """Takes over an adapter of another instance for the same layer, which then doesn't act yet.

        Args:
            other: for a layer of the same shape.
            name: of the adapter.

        Raises:
            ValueError: the name is taken, or not there.
            RuntimeError: the layer is merged.
        """
        self._check_unmerged()
        other._check_named([name])
        if name in self.settings:
            raise ValueError(f"name: {name!r} is taken")
        for parameters in ("lora_A", "lora_B", "lora_magnitude", "settings"):
            if name in getattr(other, parameters):
                getattr(self, parameters)[name] = getattr(other, parameters)[name]

    def set_active(self, weights: Mapping[str, float]) -> None:
        """Says which adapters act, and how strongly: the layer's change is the weighted sum of theirs.

        Args:
            weights: by name; whatever is not named doesn't act.

        Raises:
            ValueError: there is none of the name, or a weight isn't finite.
            RuntimeError: the layer is merged.
        """
        self._check_named(weights)
        self._check_unmerged()
        for name, weight in weights.items():
            check_number(f"weights[{name!r}]", weight)
        self.active = dict(weights)

    def delta_weight(self) -> Tensor:
        """The weighted sum of the active adapters' changes."""
        weight = self._matrix(self.base.weight)
        total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, share in self.active.items():
            update = self._update(name)
            if self.settings[name].dora:
                update = self._gain(name)[:, None] * (weight + update) - weight
            total = total + share * update
        return self._weight(total)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with its active adapters, in the dtype of the layer's output.

        Args:
            x: the layer's input.
        """
        y: Tensor = self.base(x)
        if self.merged:
            return y
        out = y
        for name, share in self.active.items():
            scale = share * self.settings[name].scaling
            if self.settings[name].dora:
                gain, bias = self._along_channels(self._gain(name)), getattr(self.base, "bias", None)
                product = y if bias is None else y - self._along_channels(bias)
                out = out + share * (gain - 1) * product + gain * self._low_rank(x, name, scale)
            else:
                out = self._plus_low_rank(out, x, name, scale)
        return out.to(y.dtype)

    def _plus_low_rank(self, y: Tensor, x: Tensor, name: str, scale: float) -> Tensor:
        return y + self._low_rank(x, name, scale)

    def _low_rank(self, x: Tensor, name: str, scale: float) -> Tensor:
        """scale B A x in the dtype of A."""
        raise NotImplementedError

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        columns, rows = features(self.base)
        return (rank, columns), (rows, rank)

    def _draw(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> None:
        """Fills A, of zeros, and B."""
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)

    def _matrix(self, weight: Tensor) -> Tensor:
        """A weight as [out, in]."""
        return weight

    def _weight(self, matrix: Tensor) -> Tensor:
        """[out, in] in the layout of the layer's weight."""
        return matrix

    def _along_channels(self, vector: Tensor) -> Tensor:
        """[out] in a shape that lies along the outputs of the layer."""
        return vector

    def _update(self, name: str) -> Tensor:
        """gamma B A as [out, in]."""
        a, b = (p[name].to(torch.promote_types(p[name].dtype, torch.float32)) for p in (self.lora_A, self.lora_B))
        return self.settings[name].scaling * (b.flatten(1) @ a.flatten(1))

    @torch.no_grad()
    def _norms(self, name: str) -> Tensor:
        """Of the rows of W_0 + gamma B A. A row of zeros gets the smallest number there is: eq. (3) then gives 0."""
        norms = (self._matrix(self.base.weight) + self._update(name)).norm(dim=1)
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _gain(self, name: str) -> Tensor:
        return self.lora_magnitude[name] / self._norms(name)

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        if not self.training or p == 0:
            return x
        if self.generator is None:
            return nn.functional.dropout(x, p)
        kept = torch.rand(x.shape, device=x.device, generator=self.generator) >= p
        return torch.where(kept, x / (1 - p) if p < 1 else x, 0)

    def _check_unmerged(self) -> None:
        if self.merged:
            raise RuntimeError("expected a layer that is not merged; unmerge it first")

    def _check_named(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.settings]
        if unknown:
            raise ValueError(f"name: expected names out of {list(self.settings)}, got {unknown}")


class LoRALinear(LoRA):
    """A linear layer with low-rank adapters.

    Args:
        base: torch.nn.Linear, or what has its attributes, or transformers' Conv1D.
        rank: r.
        alpha: of eq. (1).
        dropout: probability for each input of A, in training.
        rslora: whether the scale is that of eq. (2).
        dora: whether eq. (3) holds.
        name: of this first adapter; `add` gives the layer others.
        generator: draws the weights and, in training, what is dropped; None is the global one.
    """

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """The layer's output with its active adapters, in the dtype of the layer's output."""
        return super().forward(x)

    def _plus_low_rank(self, y: Tensor, x: Tensor, name: str, scale: float) -> Tensor:
        h, b = self._down(x, name, scale), self.lora_B[name]
        if y.dtype != h.dtype:
            return y + nn.functional.linear(h, b)
        # one pass over the output instead of three
        return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), b.mT).view(y.shape)

    def _low_rank(self, x: Tensor, name: str, scale: float) -> Tensor:
        return nn.functional.linear(self._down(x, name, scale), self.lora_B[name])

    def _down(self, x: Tensor, name: str, scale: float) -> Tensor:
        a = self.lora_A[name]
        return nn.functional.linear(self._dropped(x.to(a.dtype), self.settings[name].dropout), a) * scale

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if is_transposed(self.base) else weight

    def _weight(self, matrix: Tensor) -> Tensor:
        return self._matrix(matrix)


class LoRAEmbedding(LoRA):
    """An embedding with low-rank adapters.

    Args:
        base: torch.nn.Embedding.
        rank: r.
        alpha: of eq. (1).
        dropout: probability for each input of A, in training; here it has to be 0.
        rslora: whether the scale is that of eq. (2).
        dora: whether eq. (3) holds.
        name: of this first adapter; `add` gives the layer others.
        generator: draws the weights and, in training, what is dropped; None is the global one.
    """

    stored: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")

    def forward(self, x: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """The vectors of ids with the active adapters, in the dtype of the layer's."""
        return super().forward(x)

    def _low_rank(self, x: Tensor, name: str, scale: float) -> Tensor:
        rows = nn.functional.embedding(x, self.lora_A[name].mT, self.base.padding_idx)
        return nn.functional.linear(rows * scale, self.lora_B[name])

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not isinstance(self.base, nn.Embedding):
            raise TypeError(f"base: expected torch.nn.Embedding, got {type(self.base).__name__}")
        return (rank, self.base.num_embeddings), (self.base.embedding_dim, rank)

    def _draw(self, a: Tensor, b: Tensor, generator: torch.Generator | None) -> None:
        b.normal_(generator=generator)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _weight(self, matrix: Tensor) -> Tensor:
        return matrix.mT


class LoRAConv(LoRA):
    """A convolution with low-rank adapters.

    Args:
        base: torch.nn.Conv1d or torch.nn.Conv2d.
        rank: r.
        alpha: of eq. (1).
        dropout: probability for each input of A, in training.
        rslora: whether the scale is that of eq. (2).
        dora: whether eq. (3) holds.
        name: of this first adapter; `add` gives the layer others.
        generator: draws the weights and, in training, what is dropped; None is the global one.
    """

    def _low_rank(self, x: Tensor, name: str, scale: float) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        x = self._dropped(x.to(a.dtype), self.settings[name].dropout)
        if self.base.groups > 1:
            return self.base._conv_forward(x, self._weight(scale * (b.flatten(1) @ a.flatten(1))), None)
        conv = nn.functional.conv1d if b.ndim == 3 else nn.functional.conv2d
        return conv(self.base._conv_forward(x, a, None) * scale, b)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not isinstance(self.base, (nn.Conv1d, nn.Conv2d)):
            raise TypeError(f"base: expected torch.nn.Conv1d or Conv2d, got {type(self.base).__name__}")
        shape = tuple(self.base.weight.shape)
        return (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.base.weight.shape)

    def _along_channels(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *[1] * (self.base.weight.ndim - 2))


def _kind(base: nn.Module) -> type[LoRA]:
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding
    return LoRAConv if isinstance(base, (nn.Conv1d, nn.Conv2d)) else LoRALinear


def _make(base: nn.Module, settings: LoRASettings, name: str, generator: torch.Generator | None) -> LoRA:
    s = settings
    return _kind(base)(
        base, s.rank, s.alpha, dropout=s.dropout, rslora=s.rslora, dora=s.dora, name=name, generator=generator
    )


def inject_lora(
    model: nn.Module,
    targets: str | Iterable[str],
    settings: LoRASettings | None = None,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> list[str]:
    r"""Puts low-rank adapters in the place of linear layers, embeddings and convolutions; see `inject`.

    Args:
        model: changed in place.
        targets: regular expressions that match whole paths.
        settings: of all adapters; None are the defaults.
        rank_pattern: other ranks, by regular expressions that match the end of a path from some dot on, such as
            ``r"layers\.0\.self_attn\.q_proj"`` or ``"q_proj"``; the first that matches counts.
        alpha_pattern: other alphas, likewise.
        name: of the adapter on each layer.
        generator: draws the weights; None is the global one.

    Returns:
        The paths, in the model's order.

    Raises:
        ValueError: as `inject`, or a pattern that matches no path. Nothing has changed then.
        TypeError: a layer that can have no adapter.
    """
    settings, ranks, alphas = settings or LoRASettings(), rank_pattern or {}, alpha_pattern or {}
    paths = matching_layers(model, targets)
    for kind, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        unused = [pattern for pattern in patterns if not any(_matching([pattern], path) for path in paths)]
        if unused:
            raise ValueError(f"{kind}: expected patterns that match one of {list(paths)}, got {unused}")

    def make(path: str, base: nn.Module) -> LoRA:
        rank, alpha = ranks.get(_matching(ranks, path)), alphas.get(_matching(alphas, path))
        own = replace(settings, rank=rank or settings.rank, alpha=settings.alpha if alpha is None else alpha)
        return _make(base, own, name, generator)

    return inject(model, targets, make)


def _matching(patterns: Iterable[str], path: str) -> str:
    """The first pattern that matches a path, as the peft library does it; "" where none does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), "")


def set_active(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Says which adapters of a model act, and how strongly; see `LoRALinear.set_active`.

    Args:
        model: with low-rank adapters.
        weights: by name; a layer without an adapter of the name passes over it.

    Raises:
        ValueError: no layer has an adapter of the name.
        RuntimeError: a layer is merged.
    """
    layers = [layer for layer in adapters(model).values() if isinstance(layer, LoRA)]
    unknown = set(weights) - {name for layer in layers for name in layer.settings}
    if unknown:
        raise ValueError(f"weights: no layer has adapters of the names {sorted(unknown)}")
    for layer in layers:
        layer._check_unmerged()
    for layer in layers:
        layer.set_active({name: weight for name, weight in weights.items() if name in layer.settings})


def lora_plus_groups(model: nn.Module, lr: float, *, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser with the step sizes of eq. (4).

    Args:
        model: with low-rank adapters.
        lr: the step size of everything but B.
        ratio: of B's step size to that.

    Raises:
        ValueError: step size or ratio are not positive, or nothing is trained.
    """
    check_number("lr", lr, above=0.0)
    check_number("ratio", ratio, above=0.0)
    trained = trainable_parameters(model)
    if not trained:
        raise ValueError("model: expected trained parameters, got none")
    layers = [layer for layer in adapters(model).values() if isinstance(layer, LoRA)]
    large = {id(p) for layer in layers if not isinstance(layer, LoRAEmbedding) for p in layer.lora_B.values()}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in trained.values():
        groups[id(parameter) in large].append(parameter)
    return [{"params": groups[0], "lr": lr}, {"params": groups[1], "lr": ratio * lr}]


# settings of the peft library's config that change what an adapter computes, and that are not here
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# ways to start that leave the layer's weight as it is
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _save(found: dict[str, Adapter], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = {path: layer for path, layer in found.items() if isinstance(layer, LoRA) and name in layer.settings}
    if layers.keys() != found.keys():
        raise ValueError(f"name: expected an adapter of the name {name!r} on each of {list(found)}")
    if any(getattr(layer.base, "groups", 1) > 1 for layer in layers.values()):
        raise ValueError("model: the peft library means something else by an adapter of a grouped convolution")
    settings = {path: layer.settings[name] for path, layer in layers.items()}
    first = next(iter(settings.values()))
    common = replace(first, rank=1, alpha=1.0)
    if any(replace(s, rank=1, alpha=1.0) != common for s in settings.values()):
        raise ValueError("model: expected the same dropout, rslora and dora on each layer")
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        a, b = layer.stored
        tensors |= {f"{path}.{a}": layer.lora_A[name], f"{path}.{b}": layer.lora_B[name]}
        if first.dora:
            magnitude = layer._along_channels(layer.lora_magnitude[name])
            # of a convolution: [1, out, 1, 1]
            tensors[f"{path}.lora_magnitude_vector"] = magnitude if magnitude.ndim == 1 else magnitude[None]
    config = {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "rank_pattern": {f"^{re.escape(p)}": s.rank for p, s in settings.items() if s.rank != first.rank},
        "alpha_pattern": {f"^{re.escape(p)}": s.alpha for p, s in settings.items() if s.alpha != first.alpha},
    }
    return config, tensors


def _load(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> list[str]:
    foreign = [key for key in _FOREIGN if config.get(key)]
    if foreign or config.get("init_lora_weights", True) not in _STARTS:
        raise ValueError(f"adapter_config.json: {foreign or 'this init_lora_weights'} is not implemented here")
    layers = dict(model.named_modules())
    by_path: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        path, dot, stored = key.rpartition(".lora_")
        if dot:
            by_path.setdefault(path, {})[f"lora_{stored}"] = x
        elif not _is_weight_of(layers, key, x):  # the library adds the weight of an embedding with an adapter
            raise ValueError(f"adapter_model.safetensors: expected low-rank adapters, got {key}")
    unknown = [path for path in by_path if path not in layers]
    if unknown:
        raise ValueError(f"adapter_model.safetensors: the model has no layers {unknown[:3]}")
    ready: dict[str, LoRA] = {}

    def make(path: str, base: nn.Module) -> LoRA:
        ready[path] = _from_file(path, base, config, by_path[path], name)
        return ready[path]

    adapted = {path: layer for path, layer in layers.items() if path in by_path and isinstance(layer, LoRA)}
    if not adapted:
        return inject(model, [re.escape(path) for path in by_path], make)
    if len(adapted) < len(by_path):
        raise ValueError("model: expected low-rank adapters on all layers that the file has, or on none")
    for path, layer in adapted.items():
        layer._check_unmerged()
        if name in layer.settings:
            raise ValueError(f"name: {path} has an adapter {name!r} already")
        make(path, layer.base)
    for path, layer in adapted.items():
        layer.take(ready[path], name)
    return list(adapted)


def _is_weight_of(layers: dict[str, nn.Module], key: str, x: Tensor) -> bool:
    path, dot, _ = key.rpartition(".base_layer.weight")
    layer = layers.get(path)
    weight = getattr(layer.base if isinstance(layer, Adapter) else layer, "weight", None)
    return bool(dot) and weight is not None and torch.equal(weight.to(x), x)


def _from_file(path: str, base: nn.Module, config: dict[str, Any], stored: dict[str, Tensor], name: str) -> LoRA:
    kind = _kind(base)
    wanted = {*kind.stored, "lora_magnitude_vector"} if config.get("use_dora") else {*kind.stored}
    if stored.keys() != wanted:
        raise ValueError(f"adapter_model.safetensors: expected {sorted(wanted)} for {path}, got {sorted(stored)}")
    alphas = config.get("alpha_pattern") or {}
    settings = LoRASettings(
        rank=stored[kind.stored[0]].shape[0],
        alpha=alphas.get(_matching(alphas, path), config["lora_alpha"]),
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )
    # a generator of its own: what it draws is replaced
    layer = _make(base, settings, name, torch.Generator(base.weight.device))  # type: ignore[arg-type]
    layer.generator = None
    own = {kind.stored[0]: layer.lora_A[name], kind.stored[1]: layer.lora_B[name]}
    if settings.dora:
        own["lora_magnitude_vector"] = layer.lora_magnitude[name]
        stored["lora_magnitude_vector"] = stored["lora_magnitude_vector"].flatten()
    wrong = [f"{key} {tuple(x.shape)}" for key, x in stored.items() if x.shape != own[key].shape]
    if wrong:
        raise ValueError(f"adapter_model.safetensors: {wrong} of {path} doesn't fit the layer")
    with torch.no_grad():
        for key, x in stored.items():
            own[key].copy_(x)
    return layer


PEFT_FORMATS["LORA"] = PeftFormat(_save, _load)
