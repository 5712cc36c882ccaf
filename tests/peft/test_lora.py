from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.peft import (
    LoRAConv,
    LoRAEmbedding,
    LoRALinear,
    LoRASettings,
    adapter_state_dict,
    adapters,
    inject,
    inject_lora,
    load_adapter,
    lora_plus_groups,
    merge,
    save_adapter,
    set_active,
    trainable_parameters,
    unmerge,
)
from tests.contracts.families import Sample
from tests.peft.models import tiny_gpt2, tiny_llama


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=_rng(seed), dtype=dtype)


def _linear(columns: int = 5, rows: int = 7, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(columns, rows, bias=bias)


class Conv1D(nn.Module):
    """What the layer of GPT-2 in transformers is (that of the tests with peft is the real one): weight [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 7
        self.weight, self.bias = (nn.Parameter(_random(*shape).float()) for shape in ((5, 7), (7,)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _embedding(**options: Any) -> nn.Embedding:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Embedding(11, 6, **options)


def _conv(kind: type[nn.Module] = nn.Conv2d, groups: int = 1, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(4, 6, (3, 2) if kind is nn.Conv2d else 3, groups=groups, stride=2, padding=1, dilation=2, **options)


def _perturbed(module: nn.Module) -> Any:
    """Nothing is at a value where it has no effect."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.add_(0.3 * _random(*parameter.shape, seed=i + 5))
    return module


def _injected(generator: torch.Generator) -> dict[str, Tensor]:
    model = nn.ModuleDict({"q": _linear()})
    inject_lora(model, "q", generator=generator)
    return adapter_state_dict(model)


IMAGE = (2, 4, 9, 8)
CONTRACT = {
    "inject_lora": lambda: Sample(_injected),
    "LoRALinear": lambda: Sample(LoRALinear(_linear(), 3, 5.0, generator=_rng()), (_random(2, 3, 5).float(),)),
    "LoRALinear, DoRA": lambda: Sample(
        LoRALinear(_linear(), 3, 5.0, rslora=True, dora=True, generator=_rng()), (_random(2, 3, 5).float(),)
    ),
    "LoRALinear, transposed": lambda: Sample(
        LoRALinear(Conv1D(), 3, 5.0, dora=True, generator=_rng()), (_random(2, 3, 5).float(),)
    ),
    "LoRAEmbedding": lambda: Sample(LoRAEmbedding(_embedding(), 3, generator=_rng()), (torch.arange(6).view(2, 3),)),
    "LoRAEmbedding, DoRA": lambda: Sample(
        LoRAEmbedding(_embedding(), 3, dora=True, generator=_rng()), (torch.arange(6).view(2, 3),)
    ),
    "LoRAConv": lambda: Sample(LoRAConv(_conv(), 3, 5.0, generator=_rng()), (_random(*IMAGE).float(),)),
    "LoRAConv, DoRA": lambda: Sample(
        LoRAConv(_conv(), 3, 5.0, dora=True, generator=_rng()), (_random(*IMAGE).float(),)
    ),
    "LoRAConv, groups": lambda: Sample(
        LoRAConv(_conv(groups=2, padding_mode="circular"), 3, 5.0, generator=_rng()), (_random(*IMAGE).float(),)
    ),
    "LoRAConv, in one dimension": lambda: Sample(
        LoRAConv(_conv(nn.Conv1d), 3, 5.0, dora=True, generator=_rng()), (_random(2, 4, 9).float(),)
    ),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_equals_numpy_from_the_equations(rslora: bool, dora: bool) -> None:
    layer = _perturbed(LoRALinear(_linear().double(), 3, 5.0, rslora=rslora, dora=dora))
    w, bias, a, b = (
        t.detach().numpy()
        for t in (layer.base.weight, layer.base.bias, layer.lora_A["default"], layer.lora_B["default"])
    )
    weight = w + (5 / np.sqrt(3) if rslora else 5 / 3) * np.outer(b[:, 0], a[0])
    for k in (1, 2):
        weight = weight + (5 / np.sqrt(3) if rslora else 5 / 3) * np.outer(b[:, k], a[k])
    if dora:
        m = layer.lora_magnitude["default"].detach().numpy()
        weight = np.stack([m[i] * row / np.sqrt((row**2).sum()) for i, row in enumerate(weight)])
    x = _random(4, 5)
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() @ weight.T + bias, rtol=1e-12)
    np.testing.assert_allclose((layer.delta_weight() + layer.base.weight).detach().numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(layer(x[0]).detach().numpy(), layer(x)[0].detach().numpy(), rtol=1e-12)


def test_gradients_are_those_of_the_equation_with_a_constant_norm() -> None:
    for dora in (False, True):
        layer = _perturbed(LoRALinear(_linear().double(), 3, 5.0, dora=dora))
        x = _random(4, 5).requires_grad_()
        norm = (layer.base.weight + layer.delta_weight() if not dora else _plain(layer)).norm(dim=1).detach()
        weight = layer.base.weight + layer.delta_weight() if not dora else _plain(layer)
        if dora:
            weight = (layer.lora_magnitude["default"] / norm)[:, None] * weight
        wanted = (nn.functional.linear(x, weight, layer.base.bias) * _random(4, 7, seed=3)).sum()
        found = (layer(x) * _random(4, 7, seed=3)).sum()
        leaves = [x, *trainable_parameters(layer).values()]
        assert len(leaves) == 3 + dora
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


def _plain(layer: LoRALinear) -> Tensor:
    return layer.base.weight + 5 / 3 * layer.lora_B["default"] @ layer.lora_A["default"]


def test_reduces_to_torch_nn_linear_bit_for_bit_at_the_start_and_with_nothing_active() -> None:
    x = _random(4, 5).float()
    for dora in (False, True):
        layer = LoRALinear(_linear(), 3, dora=dora, generator=_rng())
        assert torch.equal(layer(x), _linear()(x))
        assert not layer.lora_A["default"].eq(0).any()
        assert layer.lora_A["default"].abs().max() <= 5**-0.5
        _perturbed(layer).set_active({})
        assert torch.equal(layer(x), _linear()(x))
        assert not layer.delta_weight().any()


def test_reduces_to_full_fine_tuning_at_full_rank() -> None:
    wanted, layer = _random(7, 5), LoRALinear(_linear().double(), 5, 5.0)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    with torch.no_grad():
        layer.lora_B["default"].copy_(u * s)
        layer.lora_A["default"].copy_(v)
    torch.testing.assert_close(layer.delta_weight(), wanted)


def test_a_new_dora_row_of_zeros_stays_zero_and_finite() -> None:
    base = _linear()
    with torch.no_grad():
        base.weight[2] = 0
    x = _random(4, 5).float()
    layer = LoRALinear(base, 3, dora=True)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(layer).values())


def test_trains_so_many_numbers_and_nothing_of_the_base() -> None:
    layer = LoRALinear(_linear(), 3)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 3 * (5 + 7)
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"base.weight", "base.bias"}


def test_several_adapters_act_as_the_weighted_sum_of_their_changes() -> None:
    for name in ("LoRALinear, DoRA", "LoRAEmbedding", "LoRAConv, DoRA"):
        sample = CONTRACT[name]()
        layer = sample.target
        layer.add("other", LoRASettings(rank=2, alpha=3.0, dora=name.endswith("DoRA")))
        x, base = sample.args[0], layer.base(sample.args[0])
        before = layer(x)
        _perturbed(layer)
        changes = {}
        for adapter in ("default", "other"):
            layer.set_active({adapter: 1.0})
            changes[adapter] = layer(x) - base
            assert not torch.allclose(layer(x), before)
        layer.set_active({"default": 0.7, "other": -0.4})
        torch.testing.assert_close(layer(x), base + 0.7 * changes["default"] - 0.4 * changes["other"])
        expected = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="not merged"):
            layer.set_active({"other": 1.0})
        with pytest.raises(RuntimeError, match="not merged"):
            layer.add("third", LoRASettings())


def test_dropout_only_in_training_and_only_before_a() -> None:
    for name in ("LoRALinear", "LoRAConv"):
        x = CONTRACT[name]().args[0]
        kind, base = type(CONTRACT[name]().target), CONTRACT[name]().target.base
        layer = _perturbed(kind(base, 3, dropout=0.5, generator=_rng()))
        plain = copy.deepcopy(layer).eval()
        generator = copy.deepcopy(layer.generator)
        kept = (torch.rand(x.shape, generator=generator) >= 0.5) * 2.0
        expected = base(x) + plain(x * kept) - base(x * kept)
        torch.testing.assert_close(layer(x), expected)
        assert not torch.equal(layer(x), layer(x))
        torch.testing.assert_close(layer.eval()(x), plain(x))
        every = kind(base, 3, dropout=1.0, generator=_rng())
        assert torch.equal(_perturbed(every)(x), base(x))


def test_dropout_without_a_generator_follows_the_global_one() -> None:
    layer, x = _perturbed(LoRALinear(_linear(), 3, dropout=0.5)), _random(4, 5).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x), one)
        assert not torch.equal(layer(x), one)


def test_adapters_stay_in_single_precision_on_a_half_precision_base() -> None:
    for dora in (False, True):
        layer = _perturbed(LoRALinear(_linear().bfloat16(), 3, dora=dora))
        assert {p.dtype for p in trainable_parameters(layer).values()} == {torch.float32}
        x = _random(4, 5).bfloat16()
        exact = copy.deepcopy(layer).double()
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=2**-7, atol=2**-6)


def test_padding_gets_no_gradient() -> None:
    layer = _perturbed(LoRAEmbedding(_embedding(padding_idx=3), 2))
    layer(torch.tensor([3, 4, 3])).sum().backward()
    grad = layer.lora_A["default"].grad
    assert grad[:, 4].all()
    assert not grad[:, 3].any()


def test_patterns_give_ranks_and_alphas() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": _linear(), "aq": _linear()}), "q": _linear()})
    settings = LoRASettings(rank=2, alpha=3.0)
    paths = inject_lora(
        model, [r"a\..*", "q"], settings, rank_pattern={"^q": 4, "q": 5}, alpha_pattern={r"a\.q": 7.0, "aq": 0.0}
    )
    assert paths == ["a.q", "a.aq", "q"]
    found = {path: layer.settings["default"] for path, layer in adapters(model).items()}
    assert {path: (s.rank, s.alpha) for path, s in found.items()} == {"a.q": (5, 7.0), "a.aq": (2, 0.0), "q": (4, 3.0)}
    for pattern in ({"rank_pattern": {"a": 3}}, {"alpha_pattern": {"k": 3.0}}):
        fresh = nn.ModuleDict({"q": _linear()})
        with pytest.raises(ValueError, match=next(iter(pattern))):
            inject_lora(fresh, "q", **pattern)  # type: ignore[arg-type]
        assert adapters(fresh) == {}
        assert all(p.requires_grad for p in fresh.parameters())


def test_lora_plus_gives_b_the_larger_step_size() -> None:
    model = nn.ModuleDict({"e": _embedding(), "q": _linear()})
    inject_lora(model, ["e", "q"], LoRASettings(rank=2, dora=True))
    small, large = lora_plus_groups(model, 0.1, ratio=4.0)
    assert (small["lr"], large["lr"]) == (0.1, 0.4)
    assert [group["lr"] for group in lora_plus_groups(model, 0.5)] == [0.5, 8.0]
    assert [id(p) for p in large["params"]] == [id(model["q"].lora_B["default"])]
    named = trainable_parameters(model)
    assert {id(p) for p in small["params"]} == {id(p) for p in named.values()} - {id(model["q"].lora_B["default"])}
    with pytest.raises(ValueError, match="ratio"):
        lora_plus_groups(model, 0.1, ratio=0.0)
    with pytest.raises(ValueError, match="lr"):
        lora_plus_groups(model, 0.0)
    with pytest.raises(ValueError, match="trained"):
        lora_plus_groups(_linear().requires_grad_(False), 0.1)


def test_the_language_model_takes_adapters_everywhere() -> None:
    model = TinyLM(TinyLMConfig(vocab_size=13, d_model=16, layers=2, heads=4, hidden=24), generator=_rng())
    ids = torch.arange(8).view(2, 4)
    before = model(ids).logits
    head = model.lm_head.weight
    inject_lora(model, [r".*_proj", "embed_tokens"], LoRASettings(rank=2), generator=_rng())
    assert len(adapters(model)) == 2 * 7 + 1
    assert torch.equal(model(ids).logits, before)
    _perturbed(model)
    after = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, after)
    assert model.lm_head.weight is head  # tied to the embedding, which is merged
    unmerge(model)
    assert torch.equal(model(ids).logits, after)


IDS = torch.arange(24).view(2, 12)
KINDS = {
    "LoRA": (tiny_llama, [r".*\.[qv]_proj"], {}),
    "rsLoRA": (tiny_llama, [r".*\.down_proj"], {"rslora": True}),
    "DoRA": (tiny_llama, [r".*\.q_proj", r".*\.up_proj"], {"dora": True}),
    "embedding": (tiny_llama, [r"model\.embed_tokens"], {}),
    "GPT-2": (tiny_gpt2, [r".*\.c_attn", r".*\.h\.0\.mlp\.c_fc"], {}),
    "GPT-2 with DoRA": (tiny_gpt2, [r".*\.c_proj"], {"dora": True}),
}
each_kind = pytest.mark.parametrize(("make", "targets", "options"), KINDS.values(), ids=KINDS)


@each_kind
def test_what_is_saved_here_means_the_same_to_peft(
    make: Any, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    model = make()
    first = inject_lora(model, targets, LoRASettings(rank=3, alpha=5.0, **options))[0]
    _perturbed(model)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make()(IDS).logits, model(IDS).logits, atol=1e-3)
    assert first in adapters(model)


@each_kind
def test_what_peft_saves_means_the_same_here(
    make: Any, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    names = {"rslora": "use_rslora", "dora": "use_dora"}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="|".join(targets), rank_pattern={"layers.1.self_attn.q_proj": 4, "h.1.*": 5},
        alpha_pattern={"0.*v_proj": 9}, fan_in_fan_out=make is tiny_gpt2, **{names[k]: v for k, v in options.items()}
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _perturbed(peft.get_peft_model(make(), config)).eval()
        theirs.save_pretrained(tmp_path)
    model = make()
    paths = load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    expected = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == expected
    assert list(adapters(model)) == paths


def _convs() -> nn.Module:
    return nn.Sequential(_conv(nn.Conv1d, padding_mode="zeros"), nn.Conv1d(6, 3, 1)).eval()


def test_convolutions_too(tmp_path: Path) -> None:
    import peft

    model = _convs()
    base = copy.deepcopy(model)
    base[0].dilation = model[0].dilation = (1,)  # the library loses it
    inject_lora(model, "0", LoRASettings(rank=2, alpha=3.0, dora=True))
    save_adapter(_perturbed(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = _random(2, 4, 9).float()
    torch.testing.assert_close(theirs(x), model(x))
    fresh = copy.deepcopy(base)
    assert load_adapter(fresh, tmp_path) == ["0"]
    torch.testing.assert_close(fresh(x), model(x))


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": _linear(), "aq": _linear()})
    inject_lora(model, ["q"], LoRASettings(rank=2, alpha=3.0, dropout=0.25, rslora=True))
    save_adapter(_perturbed(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3.0, 0.25)
    x, before = _random(4, 5).float(), model["q"].eval()(_random(4, 5).float())
    assert load_adapter(model, tmp_path, name="again") == ["q"]
    assert torch.equal(model["q"](x), before)
    set_active(model, {"again": 1.0})
    assert torch.equal(model["q"](x), before)
    assert model["q"].settings["again"] == model["q"].settings["default"]
    save_adapter(model, tmp_path / "again", name="again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    with pytest.raises(ValueError, match="again"):
        load_adapter(model, tmp_path, name="again")
    with pytest.raises(ValueError, match="names"):
        set_active(model, {"third": 1.0})
    with pytest.raises(ValueError, match="third"):
        save_adapter(model, tmp_path, name="third")


def _edit(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    path = folder / "adapter_model.safetensors"
    state = load_file(path) | {f"base_model.model.{k}": v for k, v in tensors.items()}
    save_file({k: v for k, v in state.items() if v is not None}, path)


def test_a_file_that_means_something_else_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    edits: list[tuple[str, dict[str, Any], dict[str, Tensor | None]]] = [
        ("lora_bias", {"lora_bias": True}, {}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}, {}),
        ("modules_to_save", {"modules_to_save": ["q"]}, {}),
        ("biases", {"bias": "all"}, {}),
        ("peft_type", {"peft_type": "IA3"}, {}),
        ("no layers", {}, {"k.lora_A.weight": torch.ones(2, 5), "k.lora_B.weight": torch.ones(7, 2)}),
        ("lora_magnitude_vector", {}, {"q.lora_magnitude_vector": torch.ones(7)}),
        ("lora_B", {}, {"q.lora_B.weight": None}),
        ("fit", {}, {"q.lora_B.weight": torch.ones(7, 3)}),
        ("low-rank", {}, {"q.base_layer.weight": torch.ones(7, 5)}),
        ("begin with", {}, {}),
    ]
    for i, (message, config, tensors) in enumerate(edits):
        model = nn.ModuleDict({"q": _linear(), "v": _linear()})
        inject_lora(model, ["q", "v"], LoRASettings(rank=2))
        save_adapter(model, tmp_path / str(i))
        _edit(tmp_path / str(i), config, **tensors)
        if message == "begin with":
            save_file({"q.lora_A.weight": torch.ones(2, 5)}, tmp_path / str(i) / "adapter_model.safetensors")
        fresh = nn.ModuleDict({"q": _linear(), "v": _linear()})
        with pytest.raises(ValueError, match=message):
            load_adapter(fresh, tmp_path / str(i))
        assert adapters(fresh) == {}
        assert all(p.requires_grad for p in fresh.parameters())


def test_what_cannot_be_said_in_a_file_is_not_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": _linear(), "v": _linear()})
    with pytest.raises(ValueError, match="adapters of one kind"):
        save_adapter(model, tmp_path)
    inject(model, "q", lambda path, base: LoRALinear(base, dora=True))
    inject(model, "v", lambda path, base: LoRALinear(base, dropout=0.1))
    with pytest.raises(ValueError, match="the same dropout"):
        save_adapter(model, tmp_path)
    grouped = nn.ModuleDict({"c": _conv(groups=2)})
    inject_lora(grouped, "c")
    with pytest.raises(ValueError, match="grouped"):
        save_adapter(grouped, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named() -> None:
    for name, settings in {
        "rank": partial(LoRASettings, rank=0),
        "alpha": partial(LoRASettings, alpha=float("nan")),
        "dropout": partial(LoRASettings, dropout=1.5),
    }.items():
        with pytest.raises(ValueError, match=name):
            settings()
    for kind, base in ((LoRALinear, nn.ReLU()), (LoRAEmbedding, _linear()), (LoRAConv, _linear())):
        with pytest.raises(TypeError, match="base"):
            kind(base)
    layer = LoRALinear(_linear())
    for name in ("default", "", "a.b"):
        with pytest.raises(ValueError, match="name"):
            layer.add(name, LoRASettings())
    with pytest.raises(ValueError, match="name"):
        layer.set_active({"other": 1.0})
    with pytest.raises(ValueError, match="weights"):
        layer.set_active({"default": float("inf")})
    with pytest.raises(ValueError, match="without an adapter"):
        LoRALinear(layer)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_that_with_the_changed_weight(kind: type[nn.Module], groups: int) -> None:
    """By the definition: W + alpha / rank B A in place of W, B A taken entry by entry."""
    base = _conv(kind, groups=groups).double()
    layer = _perturbed(LoRAConv(copy.deepcopy(base), 3, 5.0))
    a, b = (getattr(layer, f"lora_{name}")["default"].detach() for name in "AB")
    change = torch.einsum("or,r...->o...", b.flatten(1), a.flatten(1)).view_as(base.weight)
    with torch.no_grad():
        base.weight.add_(change, alpha=5 / 3)
    x = _random(2, 4, 9) if kind is nn.Conv1d else _random(*IMAGE)
    torch.testing.assert_close(layer(x.double()), base(x.double()))


def test_plain_scaling_is_the_default() -> None:
    assert LoRASettings() == LoRASettings(rank=8, alpha=16.0, dropout=0.0, rslora=False, dora=False)
