"""Offline blocks: feature maps by the published formula, one conv in eval mode, exact starts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.blocks import Block, BranchSum, LinearBlock, SqueezedSum
from orepa_compiler.blocks.catalogue import (
    ACNET,
    BLOCKS,
    DBB,
    DILATED,
    OREPA,
    OREPA_3X3_REPVGG,
    OREPA_VGG,
    REPVGG,
    mobileone,
)
from orepa_compiler.blocks.initialization import preserve
from orepa_compiler.blocks.offline import OfflineBlock, OfflineBranch, branch_norms, features_cost
from orepa_compiler.branches import (
    Kernel,
)
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import assert_same, reference
from tests.norms import randomise_norms
from tests.operator_factories import random_tensor

OFFLINE = {
    **{block.name: block for block in BLOCKS.values() if block.scaling_layer == "norm"},
    "all of OREPA": replace(OREPA, scaling_layer="norm"),
    "two repeats": mobileone(2),
}
CONVS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
    "3x3 stride 2": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
    "groups": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
    "depthwise 7x7": lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "dilated": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
    "4x3 same": lambda: nn.Conv2d(4, 4, (4, 3), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "unpadded": lambda: nn.Conv2d(4, 4, 3),
    "1d": lambda: nn.Conv1d(4, 4, 5, padding=2),
    "3d": lambda: nn.Conv3d(2, 2, 3, padding=1, bias=False),
}
SIZES = {1: (17,), 2: (10, 11), 3: (5, 6, 7)}
EVERY_BLOCK = pytest.mark.parametrize("block", OFFLINE.values(), ids=OFFLINE)
EVERY_CONV = pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
SAME_WARNING = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")


def trained(conv: Any, block: Block) -> OfflineBlock | None:
    """A float64 block whose parameters and statistics have moved; None if no branch applies."""
    conv = conv.double()
    if not block.make(conv_operator(conv)):
        return None
    made = OfflineBlock(conv, block)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.add_(0.3 * random_tensor(*parameter.shape, seed=number))
    randomise_norms(made)
    return made


def image(conv: Any, count: int = 3) -> Tensor:
    return random_tensor(count, conv.in_channels, *SIZES[len(conv.kernel_size)])


@SAME_WARNING
@EVERY_CONV
@EVERY_BLOCK
def test_in_eval_mode_it_is_one_conv(block: Block, make: Callable[[], nn.Module]) -> None:
    made = trained(make(), block)
    if made is None:
        pytest.skip(f"{block.name} has no branch for this conv")
    made.eval()
    x = image(made)
    with torch.no_grad():
        assert_same(reference(conv_operator(made), x), made(x))
        shape = (made.out_channels, made.in_channels // made.groups, *made.kernel_size)
        assert made.weight.shape == shape


@SAME_WARNING
@EVERY_CONV
@EVERY_BLOCK
def test_gradients_in_eval_mode_are_those_of_the_one_conv(
    block: Block, make: Callable[[], nn.Module]
) -> None:
    made = trained(make(), block)
    if made is None:
        pytest.skip(f"{block.name} has no branch for this conv")
    made.eval()
    x = image(made)
    found = []
    for run in (made, lambda x: reference(conv_operator(made), x)):
        made.zero_grad()
        y = run(x)
        (y * random_tensor(*y.shape, seed=9)).sum().backward()
        grads = {name: p.grad for name, p in made.named_parameters()}
        found.append({name: grad for name, grad in grads.items() if grad is not None})
        assert grads.keys() == found[-1].keys()
    largest = max(float(grad.abs().max()) for grad in found[1].values())
    for name, grad in found[0].items():
        assert float((grad - found[1][name]).abs().max()) <= 1e-12 * largest, name


@SAME_WARNING
@EVERY_CONV
@EVERY_BLOCK
def test_preserve_is_exact(block: Block, make: Callable[[], nn.Module]) -> None:
    layer: Any = make().double()
    if "origin" not in block.make(conv_operator(layer)):
        pytest.skip(f"{block.name} has no branch for this conv")
    made = OfflineBlock(layer, block).eval()
    ratio = preserve(made, layer.weight, [n for n in made.branches if n != "origin"])
    assert 0.4 < ratio < 1.6
    x = image(layer)
    with torch.no_grad():
        assert_same(made(x), layer(x))
        for branch in made.branches.values():
            assert branch(x).abs().max() > 0, "every branch takes part"


def test_a_sum_of_branches_is_squeezed_and_the_others_have_norms_of_their_own() -> None:
    made = OfflineBlock(nn.Conv2d(4, 4, 3, padding=1), OREPA_VGG)
    assert list(made.branches) == ["origin", "pointwise", "identity"]
    dense: Any = made.branches["origin"]
    assert isinstance(dense.branch, SqueezedSum)
    assert dense.branch.block_name == OREPA_3X3_REPVGG.name
    assert dict(branch_norms(made)).keys() == {
        f"branches.{name}.norms.0" for name in ("origin", "pointwise", "identity")
    }
    calls: list[tuple[int, ...]] = []
    x = torch.rand(2, 4, 9, 9)
    with CountedConvs(calls):
        made(x)
    assert calls.count(tuple(x.shape)) == 2, "the dense kernel and the 1 x 1, and no conv for x"


class CountedConvs(torch.overrides.TorchFunctionMode):
    def __init__(self, calls: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            self.calls.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_two_passes_may_share_one_backward() -> None:
    """The border reads running statistics, which the second pass moves, and torch does not see."""
    made = trained(CONVS["3x3"](), DBB)
    assert made is not None
    twin, x = copy.deepcopy(made), image(made)
    (made(x).square().sum() + made(2 * x).square().sum()).backward()
    twin(x).square().sum().backward()
    twin(2 * x).square().sum().backward()
    for (name, p), q in zip(made.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-10), name


def test_the_squeezed_branch_can_be_made_once_for_several_passes() -> None:
    made = trained(CONVS["3x3"](), OREPA_VGG)
    assert made is not None
    twin = copy.deepcopy(made)
    dense: Any = twin.branches["origin"]
    with orepa.kernels_once(twin):
        assert dense.branch.store.leaf is not None
        for number in (1, 2):
            twin(number * image(made)).square().sum().backward()
    for number in (1, 2):
        made(number * image(made)).square().sum().backward()
    for (name, p), q in zip(made.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-10 * max(float(p.grad.abs().max()), 1), (
            name
        )


def test_what_the_branches_cost_on_feature_maps() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2)
    made = OfflineBlock(layer, DBB)
    # k x k, 1 x 1, 1 x 1 - k x k and 1 x 1 - average, whose 1 x 1 run before the stride
    macs = 6 * 4 * 9 + 6 * 4 + (4 * 4 * 4 + 6 * 4 * 9) + (4 * 6 * 4 + 6 * 9)
    assert features_cost(made) == pytest.approx(macs / (6 * 4 * 9))


def test_no_kernel_is_made_of_branches_that_normalize() -> None:
    text = (
        "^the branches of block REPVGG end in norms, so no kernel can be made of them; "
        "use replace\\(block, scaling_layer='vector'\\)$"
    )
    with pytest.raises(NotLinear, match=text):
        LinearBlock(nn.Conv2d(4, 4, 3), REPVGG)
    with pytest.raises(NotLinear, match=text):
        BranchSum(conv_operator(nn.Conv2d(4, 4, 3)), REPVGG)


@pytest.mark.parametrize("block", [DBB, OREPA_VGG, ACNET, DILATED], ids=lambda b: b.name)
def test_deepcopy_pickle_and_state_dict(block: Block) -> None:
    made = trained(nn.Conv2d(4, 4, 7, padding=3, groups=4), block)
    assert made is not None
    made.eval()
    x = image(made)
    expected = made(x).detach()
    fresh = OfflineBlock(nn.Conv2d(4, 4, 7, padding=3, groups=4).double(), block).eval()
    fresh.load_state_dict(made.state_dict(), strict=True)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), fresh):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
    assert torch.equal(made(x), expected)


class Doubled(nn.Module):
    """A branch of the user's own, with an operator and nothing else."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.kernel = Kernel(conv)

    def operator(self) -> Any:
        operator = self.kernel.operator()
        return operator.scale(2 * torch.ones(1, dtype=operator.weight.dtype))


def test_a_branch_of_the_users_own_with_no_layers_is_one_layer() -> None:
    block = Block("MINE", {"origin": Kernel, "doubled": Doubled}, {}, "norm")
    made = trained(nn.Conv2d(4, 4, 3, padding=1), block)
    assert made is not None
    branch = made.eval().branches["doubled"]
    assert isinstance(branch, OfflineBranch)
    assert len(branch.norms) == 1
    x = image(made)
    with torch.no_grad():
        assert_same(reference(conv_operator(made), x), made(x))
