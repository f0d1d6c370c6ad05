"""load_weights: the files it reads, and that a file that does not fit leaves the model alone."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orepa_compiler.checkpoints.reading import has_plan
from orepa_compiler.checkpoints.weights import load_weights
from orepa_compiler.compiler import expand
from orepa_compiler.errors import CheckpointError
from tests.norms import randomise_norms


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, width, 3), norm=nn.BatchNorm2d(width), last=nn.ReLU())
    )


class Wrapped(nn.Module):
    """A net all of whose own keys begin with the prefix that DistributedDataParallel adds."""

    def __init__(self) -> None:
        super().__init__()
        self.module = net()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def refused(model: nn.Module, path: Path, **options: bool) -> str:
    """The message, after checking that the model was left as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path, **options)
    assert same(model.state_dict(), before)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@pytest.fixture
def trained() -> nn.Module:
    return randomise_norms(net())


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "ddp": lambda state: {f"module.{key}": value for key, value in state.items()},
    "ddp_compiled": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_a_torch_file_is_read_however_it_is_wrapped(
    wrap: Callable[[dict[str, Tensor]], Any], trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "trained.pth"
    torch.save(wrap(trained.state_dict()), path)
    model = net()
    load_weights(model, path)
    assert same(model.state_dict(), trained.state_dict())


def test_a_safetensors_file_is_read_whatever_its_name(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "trained.bin"
    save_file(trained.state_dict(), path)
    model = net()
    load_weights(model, path)
    assert same(model.state_dict(), trained.state_dict())
    assert not has_plan(path)


def test_a_prefix_that_is_the_models_own_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save(Wrapped().state_dict(), path)
    load_weights(Wrapped(), path)


def test_an_old_file_without_num_batches_tracked_is_read(
    trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "old.pth"
    old = {k: v for k, v in trained.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(old, path)
    model = net()
    load_weights(model, path)
    assert torch.equal(model.norm.running_mean, trained.norm.running_mean)  # type: ignore


def test_a_file_with_other_keys_is_refused_with_the_counts_and_the_first_few(
    trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    state = dict(trained.state_dict())
    state["head.weight"] = state.pop("conv.weight")
    for name in ("running_mean", "running_var", "bias"):
        del state[f"norm.{name}"]
    torch.save(state, path)
    text = refused(net(), path)
    assert "does not fit Sequential with its 7 keys" in text
    assert "4 missing (conv.weight, norm.bias, norm.running_mean, ...)" in text
    assert "1 extra (head.weight)" in text
    assert "0 of the wrong shape" in text


def test_a_file_with_other_shapes_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "wide.pth"
    torch.save({"conv.weight": net(8).state_dict()["conv.weight"]}, path)
    text = refused(net(), path)
    assert "1 of the wrong shape (conv.weight (8, 3, 3, 3) for (4, 3, 3, 3))" in text
    assert "5 missing (conv.bias, " in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv.bias": None}, "1 missing (conv.bias); 0 extra; 0 of"),
        ({"head.bias": torch.zeros(2)}, "0 missing; 1 extra (head.bias); 0 of"),
        ({"conv.bias": torch.zeros(2)}, "0 missing; 0 extra; 1 of the wrong shape (conv.bias (2,)"),
    ],
)
def test_one_difference_is_enough_to_refuse(
    change: dict[str, Tensor | None], said: str, trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "nearly.pth"
    state = {**trained.state_dict(), **change}
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    assert said in refused(net(), path)


def test_weights_in_training_form_without_their_plan_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "expanded.pth"
    torch.save(expand(net()).state_dict(), path)
    assert refused(net(), path).endswith("write it with orepa.save, which keeps the plan")
    torch.save(net().conv.state_dict(), path)  # type: ignore[union-attr, operator]
    assert refused(net(), path).endswith("name the model that this checkpoint was trained with")


def test_a_pickle_that_runs_code_is_read_only_when_allowed(
    trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "whole.pth"
    torch.save({"model": trained}, path)
    text = refused(net(), path)
    assert "reading this pickle runs code (it names torch.nn.modules.container.Sequential)" in text
    assert "--allow-pickle" in text
    model = net()
    load_weights(model, path, allow_pickle=True)
    assert same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty; save or copy it again"),
        (b"<html>not found</html>", "neither safetensors nor a torch.save file"),
        (b"\x10\0\0\0\0\0\0\0{damaged", "a damaged safetensors file"),
        (pickle.dumps([1, 2]), "neither safetensors nor a torch.save file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    for options in ({}, {"allow_pickle": True}):
        assert said in refused(net(), path, **options)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ([1, 2], "holds a list, not a state_dict"),
        ({"epoch": 1, "lr": 0.1}, "holds no state_dict, neither itself nor under state_dict, "),
        ({"epoch": 1, "lr": 0.1}, "2 keys in it (epoch, lr)"),
        ({}, "holds no state_dict"),
    ],
)
def test_a_torch_file_without_weights_is_refused(saved: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(saved, path)
    assert said in refused(net(), path)


def test_a_checkpoint_with_a_plan_is_told_by_its_metadata(
    trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "planned.safetensors"
    save_file(trained.state_dict(), path, metadata={"orepa": "{}"})
    assert has_plan(path)
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    assert not has_plan(tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="there is no such file"):
        has_plan(tmp_path / "gone")
    (tmp_path / "damaged").write_bytes(b"\x10\0\0\0\0\0\0\0{damaged")
    with pytest.raises(CheckpointError, match="a damaged safetensors file"):
        has_plan(tmp_path / "damaged")
