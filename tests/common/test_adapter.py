from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mlreviews.common.adapter import (
    PEFT_FORMATS,
    Adapter,
    PeftFormat,
    adapter_state_dict,
    adapters,
    apply_weight,
    eject,
    features,
    inject,
    load_adapter,
    load_adapter_state_dict,
    matching_layers,
    merge,
    save_adapter,
    trainable_parameters,
    unmerge,
)


class Scaled(Adapter):
    """W becomes scale W."""

    def __init__(self, base: nn.Module, scale: float = 3.0) -> None:
        super().__init__(base)
        self.scale = nn.Parameter(torch.tensor(scale))

    def delta_weight(self) -> Tensor:
        return (self.scale - 1) * self.base.weight.float()


class Silent(Adapter):
    mergeable = False

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.base(x)


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], with the names of transformers' own."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.linspace(-1, 2, nx * nf).view(nx, nf)), nn.Parameter(torch.ones(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _model() -> nn.ModuleDict:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.ModuleDict({"q": nn.Linear(3, 4), "aq": nn.Linear(3, 4), "norm": nn.LayerNorm(3)})
        return nn.ModuleDict({"block": block, "q": nn.Linear(4, 2)})


def _frozen(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if not p.requires_grad]


X = torch.linspace(-1, 1, 6).view(2, 3)


def test_layers_are_matched_by_their_whole_path_in_the_models_order() -> None:
    assert list(matching_layers(_model(), "q")) == ["q"]
    assert list(matching_layers(_model(), [r".*\.q", r"block\.a?q"])) == ["block.q", "block.aq"]
    for targets in ("k", "bloc", ["q", "k"], []):
        with pytest.raises(ValueError, match="targets"):
            matching_layers(_model(), targets)
    with pytest.raises(ValueError, match="inside a model"):
        matching_layers(_model(), ["", "q"])


def test_inject_freezes_all_but_adapters_and_eject_restores_the_layers() -> None:
    model = _model().eval()
    layer = model["block"]["q"]
    assert inject(model, r"block\.q", lambda path, base: Scaled(base)) == ["block.q"]
    assert inject(model, "q", lambda path, base: Scaled(base)) == ["q"]
    assert list(adapters(model)) == ["block.q", "q"]
    assert list(trainable_parameters(model)) == ["block.q.scale", "q.scale"]
    assert not any(module.training for module in model.modules())
    assert model["block"]["q"].base is layer
    assert eject(model) == ["block.q", "q"]
    assert model["block"]["q"] is layer
    assert list(adapters(model)) == []


def test_what_an_adapter_computes_follows_from_its_change_of_the_weight() -> None:
    model = _model()
    layer = model["block"]["q"]
    expected = 3 * (layer(X) - layer.bias) + layer.bias
    inject(model, r"block\.q", lambda path, base: Scaled(base))
    torch.testing.assert_close(model["block"]["q"](X), expected)
    half = model.bfloat16()["block"]["q"]
    assert half(X.bfloat16()).dtype == torch.bfloat16


def test_an_adapter_stands_alone() -> None:
    with pytest.raises(ValueError, match="without an adapter"):
        Scaled(Scaled(nn.Linear(3, 4)))
    model = _model()
    inject(model, r"block\.q", lambda path, base: Scaled(base))
    for targets in (r"block\.q", r"block\.q\.base"):
        with pytest.raises(ValueError, match="without an adapter"):
            inject(model, targets, lambda path, base: Scaled(base))


def test_one_layer_at_two_places_is_refused() -> None:
    model = _model()
    model["again"] = model["q"]
    with pytest.raises(ValueError, match="several places"):
        inject(model, "q", lambda path, base: Scaled(base))
    assert adapters(model) == {}


def test_a_make_that_fails_changes_nothing() -> None:
    def make(path: str, base: nn.Module) -> Adapter:
        if path == "q":
            raise KeyError(path)
        return Scaled(base)

    model = _model()
    model["block"]["aq"].weight.requires_grad_(False)
    with pytest.raises(KeyError):
        inject(model, [r"block\.a?q", "q"], make)
    assert adapters(model) == {}
    assert _frozen(model) == ["block.aq.weight"]


def test_a_tied_weight_is_merged_for_its_own_layer_only() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = model["a"].weight
    before = model["b"](X)
    inject(model, "a", lambda path, base: Scaled(base))
    merge(model)
    assert torch.equal(model["b"](X), before)
    unmerge(model)
    assert model["a"].base.weight is model["b"].weight


def test_merging_a_model_is_all_or_nothing() -> None:
    model = _model()
    inject(model, [r"block\.a?q"], lambda path, base: Scaled(base))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        model["block"]["aq"].scale.fill_(torch.nan)
    for call in (merge, lambda model: eject(model, keep=True)):
        with pytest.raises(ValueError, match="NaN"):
            call(model)
        assert not any(adapter.merged for adapter in adapters(model).values())
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items() if name != "block.aq.scale")
    with torch.no_grad():
        model["block"]["aq"].scale.fill_(2)
    merge(model)
    with pytest.raises(RuntimeError, match="merged already"):
        merge(model)
    assert all(adapter.merged for adapter in adapters(model).values())
    assert list(trainable_parameters(model)) == ["block.q.scale", "block.aq.scale"]


def test_eject_keeps_the_change_on_request() -> None:
    model = _model()
    inject(model, [r"block\.a?q"], lambda path, base: Scaled(base))
    model["block"]["q"].merge()
    expected = [model["block"][name](X) for name in ("q", "aq")]
    assert eject(model, keep=True) == ["block.q", "block.aq"]
    assert type(model["block"]["q"]) is nn.Linear
    torch.testing.assert_close([model["block"][name](X) for name in ("q", "aq")], expected)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in _model().named_parameters()}


def test_one_that_changes_no_weight_cannot_be_merged() -> None:
    model = _model()
    inject(model, r"block\.q", lambda path, base: Scaled(base))
    inject(model, r"block\.aq", lambda path, base: Silent(base))
    with pytest.raises(TypeError, match="Silent is no change of a weight"):
        merge(model)
    assert not model["block"]["q"].merged
    assert eject(model) == ["block.q", "block.aq"]


def test_a_quantised_weight_is_not_merged() -> None:
    base = nn.Linear(3, 4)
    base.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        Scaled(base).merge()


def test_the_state_of_adapters_goes_into_a_model_that_has_the_same() -> None:
    model, other = _model(), _model()
    inject(model, [r"block\.q"], lambda path, base: Scaled(base, 5.0))
    inject(other, [r"block\.q"], lambda path, base: Scaled(base))
    state = adapter_state_dict(model)
    assert {name: float(x) for name, x in state.items()} == {"block.q.scale": 5.0}
    load_adapter_state_dict(other, state)
    assert other["block"]["q"].scale.item() == 5.0
    for wrong in ({}, {"q.scale": torch.ones(())}, {"block.q.scale": torch.ones(2)}):
        with pytest.raises(ValueError, match="state"):
            load_adapter_state_dict(other, wrong)
    assert other["block"]["q"].scale.item() == 5.0


def test_features_of_linear_layers() -> None:
    assert features(nn.Linear(3, 4)) == (3, 4)
    assert features(Conv1D(4, 3)) == (3, 4)
    named = nn.Linear(3, 4)
    named.nf = 4
    assert features(named) == (3, 4)
    with pytest.raises(TypeError, match="linear layer"):
        features(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(3, 4), X),
        (Conv1D(4, 3), X),
        (nn.Embedding(5, 3), torch.tensor([[1, 4]])),
        (nn.Conv1d(3, 4, 2, stride=2, padding=1, padding_mode="circular"), X.view(1, 3, 2)),
        (nn.Conv2d(3, 6, (1, 2), groups=3, dilation=2, padding="same"), torch.ones(1, 3, 4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_weight_in_a_layer(layer: nn.Module, x: Tensor) -> None:
    other = 2 * layer.weight + 1
    bias = getattr(layer, "bias", None)
    found = apply_weight(layer, x, other)
    with torch.no_grad():
        layer.weight.copy_(other)
        if bias is not None:
            bias.zero_()
    torch.testing.assert_close(found, layer(x))


def test_an_unknown_layer_has_no_weight_to_apply() -> None:
    with pytest.raises(TypeError, match="linear layer"):
        apply_weight(nn.LayerNorm(3), X, torch.ones(3))


class TestFiles:
    @pytest.fixture(autouse=True)
    def _format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def save(found: dict[str, Adapter], name: str) -> tuple[dict[str, object], dict[str, Tensor]]:
            return {"name": name}, {f"{path}.scale": layer.scale for path, layer in found.items()}  # type: ignore[misc]

        def load(model: nn.Module, config: dict[str, object], tensors: dict[str, Tensor], name: str) -> list[str]:
            return [str(config["name"]), name, *tensors]

        monkeypatch.setitem(PEFT_FORMATS, "SCALED", PeftFormat(save, load))
        monkeypatch.setattr(Scaled, "peft_type", "SCALED")

    def _targets(self, folder: Path, targets: str | list[str]) -> object:
        model = _model()
        inject(model, targets, lambda path, base: Scaled(base))
        save_adapter(model, folder / "new" / "one", name="mine")
        return json.loads((folder / "new" / "one" / "adapter_config.json").read_text())["target_modules"]

    def test_layers_are_named_by_the_end_of_their_paths_where_that_says_which(self, tmp_path: Path) -> None:
        assert self._targets(tmp_path, [r".*q"]) == ["aq", "q"]
        assert self._targets(tmp_path, r"block\.aq") == ["aq"]
        assert self._targets(tmp_path, r"block\.q") == r"block\.q"
        assert self._targets(tmp_path, [r"block\.a?q"]) == r"block\.q|block\.aq"

    def test_names_and_tensors_arrive(self, tmp_path: Path) -> None:
        self._targets(tmp_path, "q")
        assert load_adapter(_model(), tmp_path / "new" / "one", name="yours") == ["mine", "yours", "q.scale"]

    def test_kinds_are_not_mixed(self, tmp_path: Path) -> None:
        model = _model()
        with pytest.raises(ValueError, match="adapters of one kind"):
            save_adapter(model, tmp_path)
        inject(model, r"block\.q", lambda path, base: Scaled(base))
        inject(model, r"block\.aq", lambda path, base: Silent(base))
        with pytest.raises(ValueError, match=r"'Scaled', 'Silent'"):
            save_adapter(model, tmp_path)

    def test_no_file_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_adapter(_model(), tmp_path)
