"""Every public nn.Module: state dict, copies, dtypes, devices, compilation, and the same result twice."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.contracts.families import Member, Sample, each_member

each_module = each_member("module")


def _run(sample: Sample, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return sample()


def _equal(one: Any, other: Any) -> bool:
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _moved(sample: Sample, to: torch.device | torch.dtype) -> Sample:
    """The sample with its module and all its floating-point (or, for a device, all) tensors moved."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (isinstance(to, torch.device) or leaf.is_floating_point()):
            return leaf.to(to)
        return leaf

    return Sample(copy.deepcopy(sample.target).to(to), *tree_map(move, (sample.args, sample.kwargs)))


@each_module
def test_state_dict_round_trip(member: Member) -> None:
    sample, other = member.sample(), member.sample()
    with torch.no_grad():
        for tensor in other.target.state_dict().values():
            tensor.zero_()
    other.target.load_state_dict(sample.target.state_dict())
    assert _equal(_run(sample), _run(other))


@each_module
def test_copies_are_equal_and_independent(member: Member) -> None:
    sample = member.sample()
    before = _run(sample)
    for duplicate in (copy.deepcopy(sample.target), pickle.loads(pickle.dumps(sample.target))):
        assert _equal(before, _run(Sample(duplicate, sample.args, sample.kwargs)))
        with torch.no_grad():
            for tensor in duplicate.state_dict().values():
                tensor.zero_()
    assert _equal(before, _run(sample))


@each_module
def test_same_seed_same_result_and_inputs_unchanged(member: Member) -> None:
    sample = member.sample()
    inputs = copy.deepcopy((sample.args, sample.kwargs))
    assert _equal(_run(sample), _run(sample))
    assert _equal(inputs, (sample.args, sample.kwargs))


@each_module
def test_everything_moves_to_another_device(member: Member) -> None:
    # The meta device stands for a GPU: a tensor that .to() forgets stays on the CPU and raises, or comes out there.
    moved = _moved(member.sample(), torch.device("meta"))
    assert {t.device.type for t in [*moved.target.parameters(), *moved.target.buffers()]} <= {"meta"}
    assert {t.device.type for t in tree_leaves(moved()) if isinstance(t, Tensor)} <= {"meta"}


@each_module
def test_output_has_the_dtype_of_module_and_input(member: Member) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sample = _moved(member.sample(), dtype)
        output = _run(sample)
        # A recurrent layer gives (output, state), and keeps the state of a half-precision model in float32.
        output, state = output if hasattr(sample.target, "step") else (output, None)
        for part, wide in ((output, dtype), (state, torch.promote_types(dtype, torch.float32))):
            leaves = [t for t in tree_leaves(part) if isinstance(t, Tensor) and t.is_floating_point()]
            assert {t.dtype for t in leaves} <= {dtype, wide}


@each_module
def test_every_trained_parameter_gets_a_gradient(member: Member) -> None:
    sample = member.sample()
    parameters = {name: p for name, p in sample.target.named_parameters() if p.requires_grad}
    if parameters:
        outputs = [t for t in tree_leaves(_run(sample)) if isinstance(t, Tensor) and t.requires_grad]
        sum(t.double().square().sum() for t in outputs).backward()
    assert [name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()] == []


@each_module
def test_train_and_eval_reach_every_child(member: Member) -> None:
    module: nn.Module = member.sample().target
    for mode in (False, True):
        module.train(mode)
        assert {child.training for child in module.modules()} == {mode}


@each_module
@pytest.mark.usefixtures("unchecked")
def test_is_captured_as_one_graph(member: Member) -> None:
    sample = member.sample()
    sample.target.eval()
    eager = _run(sample)
    torch.compiler.reset()  # what was captured of other members counts towards its limit
    # The shape checks of the tests are not what users compile.
    compiled = torch.compile(sample.target, fullgraph=True, backend="aot_eager")
    captured = _run(Sample(compiled, sample.args, sample.kwargs))
    torch.testing.assert_close(captured, eager)
