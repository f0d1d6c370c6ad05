"""Checkpoints of the authors' code, against an evaluation of its formulas written apart."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock, LinearBlock
from orepa_compiler.errors import CheckpointError, MissingPackage, ReparamError
from orepa_compiler.planning import recorded_plans
from orepa_compiler.reference import architectures, load_reference, network_of
from orepa_compiler.reference.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_named,
    collapsed,
    repvgg_places,
    resnet_places,
    widened,
)
from orepa_compiler.reference.blocks import recognised
from orepa_compiler.reference.keys import checked
from tests import reference_checkpoints as authors
from tests.reference_checkpoints import GEOMETRIES, Conv, Net, State, checkpoint, part

BOUND = 1e-12

RESNET18 = partial(authors.resnet, (2, 2, 2, 2))
RESNET50 = partial(authors.resnet, (3, 4, 6, 3), bottleneck=True)
RESNEXT50 = partial(RESNET50, groups=32, per_group=4)
NETS: dict[str, Net] = {
    "ResNet-18": RESNET18(),
    "ResNet-34": authors.resnet((3, 4, 6, 3)),
    "ResNet-50": RESNET50(),
    "ResNet-101": authors.resnet((3, 4, 23, 3), bottleneck=True),
    "ResNet-18-1.5x": RESNET18(width=1.5),
    "ResNet-18-2x": RESNET18(width=2.0),
    "ResNeXt-50": RESNEXT50(),
    "RepVGG-A0": authors.repvgg((48, 96, 192, 1280)),
    "RepVGG-A1": authors.repvgg((64, 128, 256, 1280)),
    "RepVGG-A2": authors.repvgg((96, 192, 384, 1408)),
}


def full(arch: str, block: Callable[[Conv], State] | None = None) -> State:
    """A checkpoint of a network in its true size: shapes without values."""
    basic = arch.startswith(("ResNet-18", "ResNet-34"))
    own = authors.orepa_vgg if arch.startswith("RepVGG") else authors.orepa
    with torch.device("meta"):
        return checkpoint(NETS[arch], block or own, authors.conv_bn if basic else None)


# The same kinds of network with few layers and channels.
BASIC = authors.resnet((1, 2, 1, 1), width=1 / 8, classes=10)
BOTTLENECK = authors.resnet((1, 2, 1, 1), bottleneck=True, width=1 / 8, classes=10)
GROUPED = authors.resnet(
    (1, 1, 2, 1), bottleneck=True, width=1 / 4, groups=8, per_group=4, classes=10
)
EXPLICIT = authors.repvgg((8, 16, 24, 40), (1, 2, 3, 1), classes=10)


def narrow_resnet(net: Net, block: str, width: float, **sizes: int) -> nn.Module:
    from torchvision.models import resnet

    model = resnet.ResNet(getattr(resnet, block), list(net.depths), **sizes)
    model = widened(model, width)
    model.fc = nn.Linear(net.features, net.classes)
    return model


def narrow_repvgg() -> nn.Module:
    from timm.models import byobnet

    stages = zip((8, 16, 24, 40), EXPLICIT.depths, strict=True)
    blocks = tuple(byobnet.ByoBlockCfg("rep", d=d, c=c, s=2, gs=0) for c, d in stages)
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks, stem_type="rep", stem_chs=8), num_classes=10)


def small(name: str, build: Callable[[], nn.Module]) -> Architecture:
    return Architecture(name, build, resnet_places, "fc")


ARCHITECTURE = {
    "ResNet-18": small("ResNet-18", partial(narrow_resnet, BASIC, "BasicBlock", 1 / 8)),
    "ResNet-50": small("ResNet-50", partial(narrow_resnet, BOTTLENECK, "Bottleneck", 1 / 8)),
    "ResNeXt-50": small(
        "ResNeXt-50",
        partial(narrow_resnet, GROUPED, "Bottleneck", 1 / 4, groups=8, width_per_group=4),
    ),
    "RepVGG-A0": Architecture(
        "RepVGG-A0", narrow_repvgg, repvgg_places, "head.fc", partial(collapsed, narrow_repvgg)
    ),
}
NET = {"ResNet-18": BASIC, "ResNet-50": BOTTLENECK, "ResNeXt-50": GROUPED, "RepVGG-A0": EXPLICIT}


def made(arch: str) -> State:
    """A checkpoint of a small network, with -t OREPA or, for a RepVGG, -t OREPA_VGG."""
    torch.manual_seed(0)
    block = authors.orepa_vgg if arch == "RepVGG-A0" else authors.orepa
    return checkpoint(NET[arch], block, authors.conv_bn if arch == "ResNet-18" else None)


@dataclass(frozen=True)
class Stored:
    """A checkpoint of a narrow network, and the expanded network that it becomes."""

    architecture: Architecture
    net: Net
    state: State
    network: nn.Module

    def expanded(self) -> nn.Module:
        """A copy, so that a test can change it."""
        return copy.deepcopy(self.network)


@pytest.fixture(scope="module", params=list(NET))
def stored(request: pytest.FixtureRequest) -> Stored:
    architecture, state = ARCHITECTURE[request.param], made(request.param)
    expanded = loaded(state, architecture, "expanded")
    return Stored(architecture, NET[request.param], state, expanded)


@pytest.fixture(scope="module")
def resnet18() -> State:
    return made("ResNet-18")


@pytest.fixture
def small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """load_reference with the small networks in the place of the true ones."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", tuple(ARCHITECTURE.values()))


def loaded(state: State, architecture: Architecture, form: Any) -> nn.Module:
    return network_of("it", state, architecture, form=form)


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize(
    ("arch", "block", "keys", "millions"),
    [
        ("ResNet-18", None, 333, 37.76),
        ("ResNet-50", None, 639, 68.58),
        ("ResNeXt-50", None, 639, 63.71),
        ("RepVGG-A0", None, 571, 24.75),
        ("ResNet-18-2x", None, 333, 149.41),
        ("ResNet-18", authors.dbb, None, 26.29),
        ("ResNet-50", authors.dbb, None, 40.68),
        ("ResNeXt-50", authors.dbb, None, 26.99),
        ("ResNet-18", authors.conv_bn, 122, 11.689512),
        ("ResNet-50", authors.conv_bn, 320, 25.557032),
        ("RepVGG-A0", authors.conv_bn, 134, 8.31),
    ],
)
def test_the_checkpoints_made_here_have_the_documented_sizes(
    arch: str, block: Callable[[Conv], State] | None, keys: int | None, millions: float
) -> None:
    state = full(arch, block)
    assert keys is None or len(state) == keys
    digits = len(str(millions).split(".")[1])
    assert round(authors.count_parameters(state) / 1e6, digits) == millions


@pytest.mark.parametrize("arch", NETS)
def test_every_architecture_takes_its_checkpoint_whole(arch: str) -> None:
    architecture = architecture_named(arch)
    with torch.device("meta"):
        stock = architecture.build()
    places = tuple(architecture.places(stock))
    parts = checked("it", full(arch), architecture, stock, places)
    assert [part.place.name for part in parts] == [place.name for place in places]
    assert {place.name for place in places} == {conv.name for conv in NETS[arch].convs}
    filled = [path for place in places for path in (place.conv, place.norm, *place.beside.values())]
    assert sorted([*filled, architecture.classifier]) == sorted(
        path for path, module in stock.named_modules() if list(module.parameters(recurse=False))
    )


@pytest.mark.parametrize("arch", ["ResNet-18", "ResNeXt-50", "RepVGG-A0"])
def test_the_expanded_network_has_as_many_parameters(arch: str) -> None:
    state = full(arch)
    expanded = network_of("it", state, architecture_named(arch), form="expanded")
    # a row for each identity of a RepVGG is stored, and never used
    unused = sum(
        value.shape[1]
        for key, value in state.items()
        if key.endswith("rbr_dense.vector") and value.shape[0] == 6
    )
    assert bool(unused) == arch.startswith("RepVGG")
    ours = sum(p.numel() for p in expanded.parameters())
    assert ours == authors.count_parameters(state) - unused


@pytest.mark.parametrize("name", ["resnet-18", "ResNet18", "resnet18"])
def test_an_architecture_is_found_however_it_is_spelled(name: str) -> None:
    assert architecture_named(name) is ARCHITECTURES[0]
    assert architecture_named("resnext50_32x4d").name == "ResNeXt-50"
    assert architecture_named("repvgg_a2").name == "RepVGG-A2"
    assert architecture_named("WideResNet-18-2x").name == "ResNet-18-2x"


def test_the_stock_network_computes_what_theirs_does(stored: Stored) -> None:
    stock = loaded(stored.state, stored.architecture, "stock")
    assert not stock.training
    assert not any(isinstance(module, ConvBlock) for module in stock.modules())
    assert recorded_plans(stock) == ()
    x = images()
    assert error(stock(x), authors.output(stored.state, stored.net, x)) < BOUND


def test_the_expanded_network_computes_what_theirs_does(stored: Stored) -> None:
    expanded, x = stored.expanded(), images()
    assert expanded.training
    theirs = authors.output(stored.state, stored.net, x, training=True)
    assert error(expanded(x), theirs) < BOUND
    expanded = stored.expanded().eval()
    assert error(expanded(x), authors.output(stored.state, stored.net, x)) < BOUND


def test_training_goes_on_as_theirs_would(stored: Stored) -> None:
    """Two steps of SGD with momentum and decay: each parameter is theirs, under another name."""
    expanded, x = stored.expanded(), images()
    theirs = {key: value.clone() for key, value in stored.state.items()}
    own = {key: value for key, value in theirs.items() if not key.endswith(authors.BUFFERS)}
    leaves = [value.requires_grad_() for value in own.values()]
    run = partial(authors.output, theirs, stored.net, training=True)
    networks: list[tuple[Callable[[Tensor], Tensor], list[Tensor]]] = [
        (expanded, list(expanded.parameters())),
        (run, leaves),
    ]
    for network, parameters in networks:
        optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (network(x).tanh() ** 2).mean().backward()
            optimizer.step()
    before = authors.output(stored.state, stored.net, x, training=True)
    after = run(x)
    assert error(after, before) > 1e-2
    assert error(expanded(x), after) < 1e-7


@pytest.mark.parametrize("arch", ["ResNet-50", "RepVGG-A0"])
def test_an_expanded_network_is_saved_loaded_and_collapsed(arch: str, tmp_path: Path) -> None:
    architecture, state, x = ARCHITECTURE[arch], made(arch), images()
    expanded = loaded(state, architecture, "expanded")
    path = orepa.save(expanded, tmp_path / "model.safetensors")
    again = orepa.load(lambda: architecture.build().double(), path)
    own = expanded.state_dict()
    assert again.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    theirs = authors.output(state, NET[arch], x)
    assert error(orepa.collapse(again)(x), theirs) < 1e-10


def test_the_plan_says_what_is_plain_and_why(resnet18: State) -> None:
    expanded = loaded(resnet18, ARCHITECTURE["ResNet-18"], "expanded")
    (plan,) = recorded_plans(expanded)
    assert plan.summary().startswith("Plan: expand 11, squeeze 11, left alone 3;")
    assert {refusal.reason for refusal in plan.refusals} == {"plain in the authors' network"}
    assert {edit.path for edit in plan.of("expand").edits} == {
        path for path, module in expanded.named_modules() if isinstance(module, ConvBlock)
    }


FOLDED: dict[str, tuple[str, Callable[[Conv], State], Callable[[Conv], State] | None]] = {
    "deploy": ("ResNet-18", authors.deployed, authors.deployed_as("conv")),
    "deploy, bottleneck": ("ResNet-50", authors.deployed, None),
    "deploy, base": ("ResNet-18", authors.deployed_as("conv"), None),
    "deploy, DBB": (
        "ResNet-18",
        lambda conv: authors.deployed_as("dbb_reparam" if conv.k == 3 else "conv")(conv),
        None,
    ),
    "base": ("ResNet-18", authors.conv_bn, None),
    "DBB": ("ResNet-18", authors.dbb, None),
    "DBB, grouped": ("ResNeXt-50", authors.dbb, None),
    "DBB, its later key": (
        "ResNet-18",
        lambda conv: authors.dbb(conv, "idconv1.conv.weight"),
        None,
    ),
    "RepVGG, deploy": ("RepVGG-A0", authors.deployed_as("rbr_reparam"), None),
    "RepVGG, base": ("RepVGG-A0", authors.conv_bn, None),
    "RepVGG, DBB": ("RepVGG-A0", authors.dbb, None),
    "RepVGG, OREPA": ("RepVGG-A0", authors.orepa, None),
    "RepVGG, RepVGG": ("RepVGG-A0", authors.plain_repvgg, None),
}


@pytest.mark.parametrize("form", FOLDED)
def test_every_other_form_goes_into_the_stock_network_and_only_there(form: str) -> None:
    arch, block, shortcut = FOLDED[form]
    architecture, net = ARCHITECTURE[arch], NET[arch]
    state = checkpoint(net, block, shortcut)
    stock, x = loaded(state, architecture, "stock"), images()
    assert error(stock(x), authors.output(state, net, x)) < BOUND
    left = [value for module in stock.modules() for value in vars(module).values()]
    assert not any(isinstance(value, Tensor) for value in left)
    with pytest.raises(CheckpointError, match="load it with form='stock'"):
        loaded(state, architecture, "expanded")


def test_a_deploy_form_of_a_resnet_keeps_the_stock_architecture() -> None:
    architecture = ARCHITECTURE["ResNet-18"]
    state = checkpoint(BASIC, authors.deployed, authors.deployed_as("conv"))
    state = {key: value.float() for key, value in state.items()}
    stock = loaded(state, architecture, "stock")
    architecture.build().load_state_dict(stock.state_dict())
    conv, bias = (state[f"stage1.0.conv1.orepa_reparam.{name}"] for name in ("weight", "bias"))
    block = stock.get_submodule("layer1.0")
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(block.conv1.weight, conv)  # type: ignore[arg-type, union-attr]
    y = block.conv1(x)  # type: ignore[operator]
    assert torch.equal(block.bn1(y), y + bias.view(1, -1, 1, 1))  # type: ignore[operator]


def ours(own: State, conv: Conv) -> tuple[Tensor, Tensor]:
    """The kernel of a block that was stored: composed, and of our block with its parameters."""
    kind = recognised(own)
    assert kind is not None
    assert kind.block is not None
    assert kind.parameters is not None
    with torch.device("meta"):
        place = nn.Conv2d(
            conv.inside, conv.out, conv.k, conv.stride, conv.k // 2, groups=conv.groups, bias=False
        )
    assert {key: tuple(value.shape) for key, value in own.items()} == kind.shapes(place)
    block = LinearBlock(place, kind.block)
    block.load_state_dict(kind.parameters(own, conv.groups), assign=True)
    return kind.operator(own, place).weight, block.weight


def check_kernel(own: State, conv: Conv, theirs: Tensor) -> None:
    for kernel in ours(own, conv):
        assert error(kernel, theirs) < BOUND


@pytest.mark.parametrize(
    "conv", GEOMETRIES, ids=lambda c: f"{c.inside}-{c.out}, {c.groups} groups, stride {c.stride}"
)
def test_a_kernel_of_every_geometry(conv: Conv) -> None:
    """The rows of a grouped pointwise kernel, and twice the channels in more than four groups."""
    own = authors.orepa(conv)
    check_kernel(own, conv, authors.orepa_weight(own, conv.groups))


@pytest.mark.parametrize(("out", "inside"), [(6, 4), (4, 6), (5, 5)])
def test_the_identity_of_a_1x1_block_is_a_value_and_not_added(out: int, inside: int) -> None:
    conv = Conv("", out, inside, 1)
    own = authors.orepa(conv)
    check_kernel(own, conv, authors.pointwise_weight(own))


def test_the_stem_is_composed_without_a_flip() -> None:
    conv = Conv("", 6, 3, 7, 2)
    own = authors.large(conv)
    check_kernel(own, conv, authors.stem_weight(own))


@pytest.mark.parametrize(("out", "stride"), [(6, 1), (6, 2), (8, 1)])
def test_the_dense_kernel_of_a_repvgg_has_no_1x1_and_a_row_nobody_uses(
    out: int, stride: int
) -> None:
    conv = Conv("", out, 6, 3, stride)
    own = part(authors.orepa_vgg(conv), "rbr_dense")
    theirs = authors.orepa_weight(own, 1, "weight_rbr_")
    has_row = own["vector"].shape[0] == 6
    assert has_row == (out == 6 and stride == 1)
    if has_row:
        own["vector"][5] = torch.nan
    check_kernel({f"rbr_dense.{key}": value for key, value in own.items()}, conv, theirs)


def test_the_prior_is_the_stored_one() -> None:
    conv = Conv("", 6, 4, 3)
    own = authors.orepa(conv)
    before = authors.orepa_weight(own, 1)
    own["weight_orepa_prior"] = own["weight_orepa_prior"] + 1
    after = authors.orepa_weight(own, 1)
    assert error(after, before) > 0.01
    check_kernel(own, conv, after)


def test_the_identity_in_the_3x3_block_is_added_to_what_is_stored() -> None:
    conv = Conv("", 6, 4, 3)
    own = authors.orepa(conv)
    own["weight_orepa_1x1_kxk_idconv1"].zero_()  # as at the start, and where decay leads
    check_kernel(own, conv, authors.orepa_weight(own, 1))
    kind = recognised(own)
    assert kind is not None
    assert kind.parameters is not None
    name = "branches.pointwise_kernel.pointwise"
    assert kind.parameters(own, 1)[name].count_nonzero() == 0
    own["weight_orepa_1x1_kxk_idconv1"] += 1e-20  # not lost beside the one on the diagonal
    assert torch.equal(kind.parameters(own, 1)[name], own["weight_orepa_1x1_kxk_idconv1"])
    own["id_tensor"] = own["id_tensor"] * 3
    check_kernel(own, conv, authors.orepa_weight(own, 1))


def test_a_repvgg_keeps_its_three_norms() -> None:
    architecture, state = ARCHITECTURE["RepVGG-A0"], made("RepVGG-A0")
    for form in ("stock", "expanded"):
        network = loaded(state, architecture, form)
        block = network.get_submodule("stages.1.1").state_dict()
        for theirs, own in {
            "rbr_dense.bn": "conv_kxk.bn",
            "rbr_1x1.bn": "conv_1x1.bn",
            "rbr_identity": "identity",
        }.items():
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                assert torch.equal(block[f"{own}.{name}"], state[f"stage2.1.{theirs}.{name}"])


def test_kernels_are_composed_in_float64_and_cast_once(resnet18: State) -> None:
    architecture = ARCHITECTURE["ResNet-18"]
    single = {k: v.float() if v.is_floating_point() else v for k, v in resnet18.items()}
    stock = loaded(single, architecture, "stock")
    exact = authors.orepa_weight(
        {k: v.double() for k, v in part(single, "stage2.0.conv2").items()}, 1
    )
    weight = stock.get_submodule("layer2.0.conv2").weight
    assert weight.dtype == torch.float32
    # half a unit in the last place, and what 1/9 in float32 differs from the stored one
    assert torch.allclose(weight.double(), exact, rtol=1.2e-7, atol=1e-9)
    assert {p.dtype for p in loaded(single, architecture, "expanded").parameters()} == {
        torch.float32
    }


def training_file(state: State) -> dict[str, Any]:
    """What their train.py saves, from a model in DistributedDataParallel."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9)
    return {
        "epoch": 120,
        "arch": "ResNet-18",
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "best_acc1": torch.tensor(72.1),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"T_cosine_max": 10, "eta_min": 0, "base_lrs": [0.1], "last_epoch": 3},
    }


FILES: dict[str, Callable[[State, Path], None]] = {
    "plain": torch.save,
    "training": lambda state, path: torch.save(training_file(state), path),
    "prefix": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "two prefixes": lambda state, path: torch.save(
        {f"module._orig_mod.{k}": v for k, v in state.items()}, path
    ),
    "two prefixes, turned": lambda state, path: torch.save(
        {f"_orig_mod.module.{k}": v for k, v in state.items()}, path
    ),
    "safetensors": save_file,
    "no counters": lambda state, path: torch.save(
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path
    ),
}


@pytest.mark.usefixtures("small_ones")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_read_however_it_was_written(kind: str, resnet18: State, tmp_path: Path) -> None:
    path, x = tmp_path / "trained.pth.tar", images()
    FILES[kind](resnet18, path)
    stock = load_reference(str(path), "resnet18", form="stock")
    assert error(stock(x), authors.output(resnet18, BASIC, x)) < BOUND


@pytest.mark.usefixtures("small_ones")
def test_a_file_becomes_an_expanded_network_unless_asked_otherwise(
    resnet18: State, tmp_path: Path
) -> None:
    path, x = tmp_path / "trained.pth.tar", images()
    torch.save(training_file(resnet18), path)
    expanded = load_reference(path, "ResNet-18")
    assert sum(isinstance(module, ConvBlock) for module in expanded.modules()) == 11
    theirs = authors.output(resnet18, BASIC, x)
    assert error(expanded.eval()(x), theirs) < BOUND


@pytest.mark.usefixtures("small_ones")
def test_a_dict_that_was_read_is_not_shared_with_the_network(resnet18: State) -> None:
    before = {key: value.clone() for key, value in resnet18.items()}
    for form in ("expanded", "stock"):
        network = load_reference(training_file(resnet18), "ResNet-18", form=form)
        assert all(p.requires_grad and p.is_leaf for p in network.parameters())
        with torch.no_grad():
            for value in network.state_dict().values():
                value.fill_(3)
    assert all(torch.equal(resnet18[key], before[key]) for key in before)


@pytest.mark.usefixtures("small_ones")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"<html>not found</html>", "neither safetensors nor a torch.save file"),
        (pickle.dumps(print), "neither safetensors nor a torch.save file"),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trained.pth.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_reference(path, "ResNet-18")
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.usefixtures("small_ones")
def test_a_whole_pickled_model_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "trained.pth.tar"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="reading this pickle runs code"):
        load_reference(path, "ResNet-18")


@pytest.mark.usefixtures("small_ones")
def test_a_dict_without_weights() -> None:
    with pytest.raises(CheckpointError, match="the given checkpoint: holds no state_dict"):
        load_reference({"epoch": 3}, "ResNet-18")


def refused(state: State, arch: str = "ResNet-18", form: str = "stock") -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(state, ARCHITECTURE[arch], form)
    text = str(caught.value)
    assert text.startswith("it: ")
    assert "\n" not in text
    return text


def test_missing_extra_and_reshaped_keys_are_counted_and_named(resnet18: State) -> None:
    state = dict(resnet18)
    for key in ("vector", "weight_orepa_1x1", "weight_orepa_origin", "bn.bias"):
        del state[f"stage2.1.conv2.{key}"]
    state["stage2.1.conv2.weight"] = torch.zeros(1)
    state["stage2.0.conv1.vector"] = torch.zeros(5, 16)
    assert refused(state) == (
        "it: is no ResNet-18 of the authors' code, for which 231 keys were looked up: "
        "4 missing (stage2.1.conv2.weight_orepa_origin, stage2.1.conv2.vector, "
        "stage2.1.conv2.weight_orepa_1x1, ...); 1 extra (stage2.1.conv2.weight); "
        "1 of the wrong shape (stage2.0.conv1.vector (5, 16) for (6, 16)); "
        "name the architecture that it was trained as, with arch="
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"linear.bias": None}, "1 missing (linear.bias); 0 extra; 0 of the wrong shape"),
        ({"linear.scale": torch.zeros(1)}, "0 missing; 1 extra (linear.scale); 0 of"),
        (
            {"linear.bias": torch.zeros(7)},
            "0 missing; 0 extra; 1 of the wrong shape (linear.bias (7,) for (10,))",
        ),
        ({"stage0.conv1.bn.bias": 3}, "(stage0.conv1.bn.bias None for (8,))"),
        (
            {"stage1.0.conv1.weight_orepa_1x1_kxk_idconv1": torch.zeros(16, 8, 1, 1)},
            "stage1.0.conv1.weight_orepa_1x1_kxk_idconv1 (16, 8, 1, 1) for (8, 8, 1, 1)",
        ),
    ],
)
def test_one_difference_is_enough(change: dict[str, Any], said: str, resnet18: State) -> None:
    state = {**resnet18, **change}
    assert said in refused({key: value for key, value in state.items() if value is not None})


def test_a_block_of_which_nothing_is_there(resnet18: State) -> None:
    state = {k: v for k, v in resnet18.items() if not k.startswith(("stage2.1.", "stage4."))}
    text = refused(state)
    assert "5 missing (stage2.1.conv1.*, stage2.1.conv2.*, stage4.0.conv1.*, ...)" in text


def test_another_network(resnet18: State) -> None:
    assert "missing (stage1.0.conv3.*, stage1.0.shortcut.*," in refused(resnet18, "ResNet-50")
    plain = dict(narrow_resnet(BASIC, "BasicBlock", 1 / 8).state_dict())
    assert "16 missing (stage0.conv1.*, " in refused(plain)
    assert "86 extra (conv1.weight, " in refused(plain)
    assert "missing (stage0.*, " in refused(plain, "RepVGG-A0")


def test_an_average_that_is_none(resnet18: State) -> None:
    key = "stage0.conv1.weight1.weight_orepa_avg_avg"
    state = {**resnet18, key: resnet18[key].clone()}
    state[key][0, 0] = 0.5
    assert refused(state) == (
        f"it: {key} is no average: it has 0.1111 to 0.5 at its taps, 0.1111 is due; the checkpoint "
        "is damaged, or not of the authors' code"
    )


def test_repvgg_blocks_in_a_resnet() -> None:
    net = BASIC
    for block in (authors.orepa_vgg, authors.deployed_as("rbr_reparam")):
        state = checkpoint(net, lambda c, b=block: b(c) if c.k == 3 else authors.conv_bn(c))
        assert refused(state) == (
            "it: stage1.0.conv1 is a RepVGG block, behind which the authors' code always puts a "
            "ReLU, also where ResNet-18 has none: this is another network, and only their code "
            "runs it"
        )


def test_two_forms_in_one_repvgg() -> None:
    net = EXPLICIT
    deploy = authors.deployed_as("rbr_reparam")
    state = checkpoint(net, lambda c: deploy(c) if c.name == "stage3.2" else authors.orepa_vgg(c))
    assert refused(state, "RepVGG-A0") == (
        "it: stage0 is RepVGGBlock_OREPA and stage3.2 is rbr_reparam, two forms in one network; "
        "convert all of it"
    )


INFERENCE = "; load it with form='stock', for inference"
EXPAND = "; load it with form='stock', and give it branches with orepa.expand"
NO_BRANCHES: dict[str, str] = {
    "deploy": f"stage0.conv1 is or_large_reparam: in deploy form its branches are gone{INFERENCE}",
    "DBB": "stage1.0.conv1 is DBB: each of its branches ends in a norm, and those of our blocks "
    f"do not{INFERENCE}",
    "base": f"has plain convs and no branches of an OREPA block{EXPAND}",
    "RepVGG, RepVGG": f"has plain convs and no branches of an OREPA block{EXPAND}",
    "RepVGG, OREPA": "stage0 is OREPA and its block has no other branch, as no RepVGG-A0 of timm "
    f"has in training form{EXPAND}",
}


@pytest.mark.parametrize("form", NO_BRANCHES)
def test_where_there_are_no_branches_to_go_on_with(form: str) -> None:
    arch, block, shortcut = FOLDED[form]
    state = checkpoint(NET[arch], block, shortcut)
    assert refused(state, arch, "expanded") == f"it: {NO_BRANCHES[form]}"


def test_a_stock_norm_with_another_eps(resnet18: State) -> None:
    def build() -> nn.Module:
        net = narrow_resnet(BASIC, "BasicBlock", 1 / 8)
        net.get_submodule("layer1.0.bn2").eps = 1e-3  # type: ignore[assignment]
        return net

    with pytest.raises(CheckpointError) as caught:
        loaded(resnet18, Architecture("ResNet-18", build, resnet_places, "fc"), "stock")
    assert str(caught.value) == (
        "it: layer1.0.bn2 of the stock network has eps 0.001, the authors' norms have 1e-05; "
        "install a version of torchvision and timm where they agree"
    )


def test_an_unknown_architecture_and_form() -> None:
    with pytest.raises(ReparamError) as caught:
        load_reference({}, "ResNet-152")
    assert str(caught.value) == (
        "arch='ResNet-152' is none of ResNet-18, ResNet-34, ResNet-50, ResNet-101, "
        "ResNet-18-1.5x, ResNet-18-2x, ResNeXt-50, RepVGG-A0, RepVGG-A1, RepVGG-A2"
    )
    with pytest.raises(ReparamError, match="form='deploy' is neither 'expanded' nor 'stock'"):
        load_reference({}, "ResNet-18", form="deploy")  # type: ignore[arg-type]


@pytest.mark.parametrize(("package", "arch"), [("torchvision", "ResNet-18"), ("timm", "RepVGG-A0")])
def test_without_the_package_of_the_stock_network(
    package: str, arch: str, resnet18: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage) as caught:
        load_reference(resnet18, arch)
    assert str(caught.value) == (
        f"this needs the package {package}; install it with: pip install 'orepa-compiler[models]'"
    )
