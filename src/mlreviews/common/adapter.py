"""What all adapters share: a frozen layer with a few trained numbers beside it, put into a model and taken out again.

An adapter says how it changes the weight; the rest follows from that, and is made faster where there is a way::

    class ScaleAdapter(Adapter):
        def __init__(self, base):
            super().__init__(base)
            self.scale = nn.Parameter(torch.ones(()))

        def delta_weight(self):                                  # float32, the shape of base.weight
            return (self.scale - 1) * self.base.weight.float()

    paths = inject(model, r".*\\.[qv]_proj", lambda path, base: ScaleAdapter(base))
    optimiser = torch.optim.AdamW(trainable_parameters(model).values())

`save_adapter` and `load_adapter` use the files of the peft library; what its kinds of adapters store is registered in
`PEFT_FORMATS` by the modules that implement them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlreviews.common.checks import check_finite

__all__ = [
    "PEFT_FORMATS",
    "Adapter",
    "PeftFormat",
    "adapter_state_dict",
    "adapters",
    "apply_weight",
    "eject",
    "features",
    "inject",
    "is_transposed",
    "load_adapter",
    "load_adapter_state_dict",
    "matching_layers",
    "merge",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
]


def is_transposed(base: nn.Module) -> bool:
    """Whether a layer keeps its weight as [in, out], as the Conv1D of GPT-2 in transformers does (fan_in_fan_out)."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def features(base: nn.Module) -> tuple[int, int]:
    """Sizes of the vectors that a linear layer takes and gives.

    Args:
        base: `torch.nn.Linear` or what has its attributes, or transformers' Conv1D.

    Returns:
        ``(in_features, out_features)``.

    Raises:
        TypeError: another kind of layer.
    """
    if is_transposed(base):
        return int(base.weight.shape[0]), int(base.weight.shape[1])  # type: ignore[index]
    if not isinstance(getattr(base, "in_features", None), int):
        raise TypeError(f"base: expected a linear layer, got {type(base).__name__}")
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def apply_weight(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer would give with another weight, and without its bias.

    Args:
        base: Linear, Embedding, Conv1d, Conv2d or transformers' Conv1D.
        x: the layer's input; floating point is taken in the dtype of the weight.
        weight: of the shape of base.weight.

    Raises:
        TypeError: another kind of layer.
    """
    if isinstance(base, nn.Embedding):
        return nn.functional.embedding(x, weight, base.padding_idx)
    x = x.to(weight.dtype)
    if isinstance(base, (nn.Conv1d, nn.Conv2d)):
        return base._conv_forward(x, weight, None)
    features(base)
    return x @ weight if is_transposed(base) else nn.functional.linear(x, weight)


class Adapter(nn.Module):
    """A frozen layer whose weight W acts as W + delta_weight().

    A subclass gives `delta_weight`, and `change` where there is a quicker way to delta_weight() x; an adapter that is
    no change of a weight gives `forward`, and has ``mergeable = False``. Its own parameters and buffers are in
    float32, whatever the layer's dtype.

    Args:
        base: the layer; its parameters are frozen.
    """

    mergeable: ClassVar[bool] = True
    # whether a new adapter changes nothing
    identity_at_start: ClassVar[bool] = True
    # the name of the kind in the files of the peft library; None where it has none
    peft_type: ClassVar[str | None] = None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if isinstance(base, Adapter):
            raise ValueError(f"base: expected a layer without an adapter, got {type(base).__name__}")
        self.base: Any = base.requires_grad_(False)
        self.register_parameter("unmerged_weight", None)

    def delta_weight(self) -> Tensor:
        """What is added to the weight: float32, of the shape of base.weight.

        Raises:
            TypeError: the adapter is no change of a weight.
        """
        raise TypeError(f"{type(self).__name__} is no change of a weight")

    def change(self, x: Tensor) -> Tensor:
        """What is added to the layer's output.

        Args:
            x: the layer's input.

        Returns:
            Of the shape of the output, in float32 or wider.
        """
        return apply_weight(self.base, x, self.delta_weight())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the adapter, in the dtype of the layer's output.

        Args:
            x: the layer's input.
        """
        y: Tensor = self.base(x)
        return y if self.merged else (y + self.change(x)).to(y.dtype)

    @property
    def merged(self) -> bool:
        """Whether the change is in the layer's weight now."""
        return self.unmerged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Puts the change into the layer's weight, rounded once; the layer then costs what it did without.

        The layer gets another parameter: one that shares its weight, such as a tied head, stays as it is.

        Raises:
            RuntimeError: merged already.
            TypeError: the adapter is no change of a weight, or the weight isn't floating point.
            ValueError: the result has NaN or infinity; nothing has changed.
        """
        if self.merged:
            raise RuntimeError(f"merge: this {type(self).__name__} is merged already")
        weight = self.base.weight
        if not weight.is_floating_point():
            raise TypeError(f"merge: expected a floating-point weight, got {weight.dtype}")
        delta = self.delta_weight()
        merged = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(weight.dtype)
        check_finite("merged weight", merged)
        self.unmerged_weight = weight
        self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Puts the layer's own weight back, the very parameter.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError(f"unmerge: this {type(self).__name__} is not merged")
        self.base.weight, self.unmerged_weight = self.unmerged_weight, None

    def own_state(self) -> dict[str, Tensor]:
        """The state of the adapter alone, without the layer's."""
        return {name: x for name, x in self.state_dict().items() if _is_own(name)}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapters of a model by the path of the layer that each stands for.

    Args:
        model: with or without adapters.
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}


def matching_layers(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers that `inject` would replace.

    Args:
        model: with or without adapters.
        targets: regular expressions that match whole paths.

    Returns:
        The layers by path, in the model's order.

    Raises:
        ValueError: an expression matches nothing, or a match has an adapter already or is the same layer as one
            elsewhere in the model.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    layers = dict(model.named_modules(remove_duplicate=False))
    matches = [[path for path in layers if re.fullmatch(pattern, path)] for pattern in patterns]
    if not patterns or not all(matches):
        unmatched = [pattern for pattern, found in zip(patterns, matches, strict=True) if not found]
        raise ValueError(f"targets: expected regular expressions that match layers' paths, got {unmatched}")
    paths = [path for path in layers if any(path in found for found in matches)]
    taken = [path for own in adapters(model) for path in paths if path == own or path.startswith(f"{own}.")]
    if taken or "" in paths:
        raise ValueError(f"targets: expected layers without an adapter inside a model, but matched {taken or paths}")
    for path in paths:
        places = [place for place, layer in layers.items() if layer is layers[path]]
        if len(places) > 1:
            raise ValueError(f"targets: {path} is one layer at several places, {places}")
    return {path: layers[path] for path in paths}


def inject(model: nn.Module, targets: str | Iterable[str], make: Callable[[str, nn.Module], Adapter]) -> list[str]:
    r"""Puts adapters in the place of layers, and freezes all parameters but those of adapters.

    Args:
        model: changed in place.
        targets: a regular expression, or several, each of which has to match the whole path of some layer, such as
            ``r"layers\.\d+\.self_attn\.q_proj"`` or ``r".*\.q_proj"``.
        make: from a path and its layer to the adapter.

    Returns:
        The paths, in the model's order.

    Raises:
        ValueError: an expression matches nothing, or a match has an adapter already or is the same layer as one
            elsewhere in the model. Nothing has changed then, nor where `make` raises.
    """
    paths = matching_layers(model, targets)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        made = {path: make(path, layer) for path, layer in paths.items()}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    own = {id(p) for adapter in adapters(model).values() for n, p in adapter.named_parameters() if _is_own(n)}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    for path, adapter in made.items():
        model.set_submodule(path, adapter.train(paths[path].training))
    return list(paths)


def _is_own(name: str) -> bool:
    return name != "unmerged_weight" and not name.startswith("base.")


def eject(model: nn.Module, *, keep: bool = False) -> list[str]:
    """Takes all adapters out of a model. Parameters stay frozen.

    Args:
        model: changed in place.
        keep: whether the layers keep the adapters' changes in their weights; else they are as before.

    Returns:
        The paths.

    Raises:
        ValueError: `keep`, and a merged weight would have NaN or infinity; nothing has changed.
        TypeError: `keep`, and an adapter is no change of a weight; nothing has changed.
    """
    found = adapters(model)
    if keep:
        _merge_all([adapter for adapter in found.values() if not adapter.merged])
    for path, adapter in found.items():
        if adapter.merged and not keep:
            adapter.unmerge()
        model.set_submodule(path, adapter.base)
    return list(found)


def merge(model: nn.Module) -> None:
    """Merges all adapters of a model.

    Args:
        model: changed in place.

    Raises:
        RuntimeError: one is merged already.
        ValueError: a merged weight would have NaN or infinity.
        TypeError: an adapter is no change of a weight. Whatever is raised, nothing has changed.
    """
    _merge_all(list(adapters(model).values()))


def _merge_all(found: list[Adapter]) -> None:
    done: list[Adapter] = []
    try:
        for adapter in found:
            adapter.merge()
            done.append(adapter)
    except BaseException:
        for adapter in done:
            adapter.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Unmerges the adapters of a model that are merged: weights are what they were, bit for bit.

    Args:
        model: changed in place.
    """
    for adapter in adapters(model).values():
        if adapter.merged:
            adapter.unmerge()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that are trained, by name.

    Args:
        model: with adapters.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of all adapters, without the layers': small, and enough to go on from with the same model.

    Args:
        model: with adapters.
    """
    return {f"{path}.{name}": x for path, adapter in adapters(model).items() for name, x in adapter.own_state().items()}


def load_adapter_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts the result of `adapter_state_dict` into a model with the same adapters.

    Args:
        model: changed in place.
        state: by name.

    Raises:
        ValueError: names or shapes are others than the model's; nothing has changed.
    """
    own = adapter_state_dict(model)
    if own.keys() != state.keys():
        raise ValueError(f"state: names differ from the model's: {sorted(own.keys() ^ state.keys())[:6]}")
    wrong = [
        f"{name}: {tuple(x.shape)} for {tuple(own[name].shape)}"
        for name, x in state.items()
        if x.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"state: shapes differ from the model's: {wrong[:6]}")
    with torch.no_grad():
        for name, x in state.items():
            own[name].copy_(x)


@dataclass(frozen=True)
class PeftFormat:
    """How the adapters of one kind are laid out in the files of the peft library.

    Attributes:
        save: from the adapters by path and the name of one on each layer to the entries of the config that are
            particular to the kind, and the tensors by name.
        load: from a model, the config, the tensors and a name to the paths of the adapters that it put into the model.
    """

    save: Callable[[dict[str, Adapter], str], tuple[dict[str, Any], dict[str, Tensor]]]
    load: Callable[[nn.Module, dict[str, Any], dict[str, Tensor], str], list[str]]


# peft_type -> layout
PEFT_FORMATS: dict[str, PeftFormat] = {}

_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as the peft library does.

    Args:
        model: with adapters, all of one kind that the library knows.
        folder: made where it doesn't exist.
        name: of the adapter, for kinds of which a layer can have several.

    Raises:
        ValueError: no adapters, of several kinds, of one that the library doesn't know, or with settings that its
            config can't say.
    """
    found = adapters(model)
    kinds = {adapter.peft_type for adapter in found.values()}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in PEFT_FORMATS:
        names = sorted({type(adapter).__name__ for adapter in found.values()})
        raise ValueError(f"model: expected adapters of one kind out of {sorted(PEFT_FORMATS)}, got {names}")
    own, tensors = PEFT_FORMATS[kind].save(found, name)
    targets = _peft_targets(model, found)
    common = {"peft_type": kind, "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
    config = {**common, "target_modules": targets, "bias": "none", "modules_to_save": None, **own}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stored = {_PREFIX + name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(stored, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _peft_targets(model: nn.Module, found: dict[str, Adapter]) -> list[str] | str:
    """The last parts of the paths where these say which layers are meant, as people write them; else an expression."""
    paths = [path for path, _ in model.named_modules() if not any(path.startswith(f"{own}.") for own in found)]
    names = sorted({path.rpartition(".")[2] for path in found})
    if {path for path in paths if path.rpartition(".")[2] in names} == set(found):
        return names
    return "|".join(map(re.escape, found))


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> list[str]:
    """Puts the adapters that `save_adapter` or the peft library wrote into a model.

    Args:
        model: the base model, changed in place; its parameters are frozen.
        folder: with both files.
        name: for the adapter, for kinds of which a layer can have several.

    Returns:
        The paths of the layers that have adapters now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a kind of adapter or a setting that isn't here, or tensors that don't fit the model; nothing has
            changed.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    kind = config.get("peft_type")
    if kind not in PEFT_FORMATS:
        raise ValueError(f"adapter_config.json: expected peft_type out of {sorted(PEFT_FORMATS)}, got {kind!r}")
    strange = [key for key in tensors if not key.startswith(_PREFIX)]
    if strange:
        raise ValueError(f"adapter_model.safetensors: expected names that begin with {_PREFIX!r}, got {strange[:3]}")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise ValueError("adapter_config.json: expected no trained biases and no modules_to_save")
    return PEFT_FORMATS[kind].load(model, config, {key.removeprefix(_PREFIX): x for key, x in tensors.items()}, name)
