"""Checkpoints as trainers write them: what is read, what is refused, and what is said of it."""

from __future__ import annotations

import argparse
import datetime
import pathlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.checkpoints.reading import read_checkpoint, stands_for
from orepa_compiler.checkpoints.states import FoundState, find_state
from orepa_compiler.checkpoints.training_form import is_training_form, load_training_form
from orepa_compiler.checkpoints.weights import Loaded, load_weights
from orepa_compiler.errors import CheckpointError
from tests.norms import randomise_norms


def net(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3, padding=1),
            norm=nn.BatchNorm2d(4),
            act=nn.ReLU(),
            last=nn.Conv2d(4, classes, 3, padding=1),
        )
    )


class Options(dict[str, Any]):
    """As the options of Lightning: a dict of a class of its own."""


class Recorder:
    """A class that would do something if it were made again."""

    def __reduce__(self) -> Any:
        return (write_it, ("ran",))


def write_it(name: str) -> None:
    Path(name).write_text("it ran")


@pytest.fixture
def trained() -> nn.Module:
    return randomise_norms(net())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def saved(folder: Path, what: Any, **options: Any) -> Path:
    path = folder / "trained.pth"
    torch.save(what, path, **options)
    return path


def same(model: nn.Module, other: nn.Module) -> bool:
    left, right = model.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_of_two_sets_of_weights_one_has_to_be_chosen(trained: nn.Module, tmp_path: Path) -> None:
    average = randomise_norms(net())
    path = saved(
        tmp_path,
        {
            "state_dict": trained.state_dict(),
            "state_dict_ema": prefixed(average.state_dict(), "module."),
            "args": argparse.Namespace(lr=0.1),
        },
    )
    with pytest.raises(CheckpointError, match="as trained \\(state_dict\\) and their running aver"):
        load_weights(net(), path)
    model = net()
    loaded = load_weights(model, path, weights="model")
    assert same(model, trained)
    assert str(loaded) == "9 tensors from state_dict"
    loaded = load_weights(model, path, weights="ema")
    assert same(model, average)
    assert str(loaded) == (
        "9 tensors from state_dict_ema (the running average), prefix 'module.' dropped"
    )


def test_two_equal_sets_need_no_choice_and_one_set_is_not_the_other(
    trained: nn.Module, tmp_path: Path
) -> None:
    state = trained.state_dict()
    both = saved(tmp_path, {"model": state, "model_ema": prefixed(state, "module.")})
    assert load_weights(net(), both).under == "model"
    with pytest.raises(CheckpointError, match="--weights ema: it holds no average"):
        load_weights(net(), saved(tmp_path, {"model": state}), weights="ema")
    alone = load_weights(net(), saved(tmp_path, {"ema": state}))
    assert "running average" in str(alone)


@pytest.mark.parametrize(
    "prefix", ["model.", "net.backbone.", "module._orig_mod.", "_orig_mod.module.", "module.model."]
)
def test_any_one_prefix_is_dropped_and_said(
    prefix: str, trained: nn.Module, tmp_path: Path
) -> None:
    model = net()
    loaded = load_weights(model, saved(tmp_path, prefixed(trained.state_dict(), prefix)))
    assert same(model, trained)
    assert loaded.prefix == prefix
    assert f"prefix {prefix!r} dropped" in str(loaded)


def test_an_averaged_model_of_torch_is_read(trained: nn.Module, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(trained)
    model = net()
    assert load_weights(model, saved(tmp_path, averaged.state_dict())).prefix == "module."
    assert same(model, trained)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_stands_beside_the_weights_is_not_run(
    zipped: bool, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs")),
        "when": datetime.datetime(2026, 1, 1),
        "best": np.float64(0.5),
        "history": np.arange(3.0),
        "hyper_parameters": Options(width=4),
        "callback": Recorder(),
    }
    path = saved(
        tmp_path,
        {"state_dict": trained.state_dict(), **beside},
        _use_new_zipfile_serialization=zipped,
    )
    model = net()
    load_weights(model, path)
    assert same(model, trained)
    read = read_checkpoint(path, allow_pickle=False)
    assert stands_for(read["args"]) == "argparse.Namespace"
    assert read["best"] == 0.5
    assert not Path("ran").exists()


def test_a_whole_model_is_told_apart_and_a_missing_module_is_named(
    trained: nn.Module, tmp_path: Path
) -> None:
    path = saved(tmp_path, {"model": trained, "epoch": 1})
    with pytest.raises(CheckpointError, match=r"runs code \(it names torch.nn.modules.container"):
        load_weights(net(), path)
    gone = type("Gone", (nn.Sequential,), {"__module__": "gone_module"})
    with pytest.raises(CheckpointError, match="neither itself nor under"):
        find_state(path, {"epoch": 1})
    module = type(nn)("gone_module")
    module.Gone = gone  # type: ignore[attr-defined]
    import sys

    sys.modules["gone_module"] = module
    torch.save(gone(nn.Conv2d(3, 4, 1)), path)
    del sys.modules["gone_module"]
    with pytest.raises(CheckpointError, match=r"No module named 'gone_module'.*path/to/file.py"):
        load_weights(net(), path, allow_pickle=True)


def test_another_number_of_classes_is_said_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another number of classes, give --num-classes 7"):
        load_weights(net(), saved(tmp_path, net(7).state_dict()))


def test_weights_of_another_type_are_said(trained: nn.Module, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    loaded = load_weights(net(), saved(tmp_path, half))
    assert loaded == Loaded(9, cast="float16 read as float32")


@pytest.mark.parametrize("block", ["auto", "OREPA", "DBB", "MOBILEONE"])
def test_the_plain_state_dict_of_an_expanded_model_is_read(block: str) -> None:
    model = randomise_norms(orepa.expand(net(), block=block))
    state, x = prefixed(model.state_dict(), "module."), torch.randn(2, 3, 8, 8)
    assert is_training_form(state, net())
    read, loaded = load_training_form(net(), Path("e.pth"), FoundState(state))
    assert same(read, model)
    assert torch.equal(read.eval()(x), model.eval()(x))
    assert loaded.block == "OREPA_VGG" if block == "auto" else block in loaded.block
    chosen = orepa.blocks.catalogue.named(block)
    assert same(load_training_form(net(), Path("e.pth"), FoundState(state), block=chosen)[0], model)


def test_a_part_that_was_expanded_is_read_as_that_part() -> None:
    model = orepa.expand(net(), block="OREPA", where="last")
    read, _ = load_training_form(net(), Path("e.pth"), FoundState(model.state_dict()))
    assert same(read, model)
    assert isinstance(read.get_submodule("conv"), nn.Conv2d)


def test_blocks_that_no_name_gives_are_refused() -> None:
    state = orepa.expand(net(), block="OREPA").state_dict()
    with pytest.raises(CheckpointError, match="no block of that name gives Sequential these keys"):
        load_training_form(net(), Path("e.pth"), FoundState(state), block=orepa.DBB)
    strange = {key.replace("frequency", "wavelet"): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"training form .1 block: conv.,.*orepa.save"):
        load_training_form(net(), Path("e.pth"), FoundState(strange))
