"""Training in several processes: DistributedDataParallel, fully_shard, a process that dies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.training.stepping import kernels_once
from tests import distributed_training as training
from tests.processes import Died, ProcessError, run_group
from tests.training_nets import expanded_net, loss, stock_net

WAYS = ("no_sync", "no_sync, bucket views", "kernels_once", "kernels_once, compiled")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def assert_same_state(
    ours: dict[str, Any], theirs: dict[str, Any], *, without: tuple[str, ...] = ()
) -> None:
    assert list(ours) == list(theirs)
    compared = [name for name in ours if not name.endswith(without or "?")]
    assert compared
    for name in compared:
        scale = np.abs(theirs[name]).max()
        assert np.abs(ours[name] - theirs[name]).max() <= 1e-10 * scale, name


def assert_identical(states: list[dict[str, Any]], *, without: tuple[str, ...] = ()) -> None:
    for state in states[1:]:
        for name, value in states[0].items():
            assert name.endswith(without or "?") or np.array_equal(value, state[name]), name


@pytest.mark.parametrize(
    ("count", "way"), [*((2, way) for way in (*WAYS, "step_hooks")), (4, "kernels_once")]
)
def test_data_parallel_steps_are_those_of_one_process(count: int, way: str) -> None:
    found = run_group(training.data_parallel, count, way)
    assert_identical([each["state"] for each in found])
    assert_identical([each["collapsed"] for each in found])
    # running statistics are those of rank 0's own batches, as under any DistributedDataParallel
    expected = training.single_process(count)
    assert_same_state(found[0]["state"], expected, without=STATISTICS)


def test_running_statistics_with_kernels_once_are_those_of_ordinary_steps() -> None:
    ordinary, once = (run_group(training.data_parallel, 2, way)[1] for way in WAYS[::2])
    assert_same_state(once["statistics"], ordinary["statistics"])
    assert_same_state(once["state"], ordinary["state"])


def test_what_crosses_the_wire_is_the_kernels() -> None:
    """Ordinary steps send every branch's gradients; kernels_once what the plain model would."""
    model = expanded_net()
    plain = orepa.collapse(model, fold_norm=False)
    sizes = {m: sum(p.nbytes for p in m.parameters()) for m in (model, plain)}
    ordinary, once = (run_group(training.data_parallel, 2, way)[0]["sent"] for way in WAYS[::2])
    assert sum(ordinary) == training.STEPS * sizes[model]
    # one number per tensor says whether any process reached it
    flags = 4 * len(list(plain.parameters()))
    assert once == training.STEPS * [flags, sizes[plain]]
    assert sizes[model] > 2.5 * sizes[plain]


def test_gradients_that_one_process_does_not_have_count_as_zero() -> None:
    first, second = run_group(training.partly_reached, 2)
    assert not np.isnan(first).any()
    np.testing.assert_allclose(first, second, rtol=1e-12)


def test_what_the_wrapper_ignores_stays_with_its_process() -> None:
    (first, first_weight), (second, second_weight) = run_group(training.ignored, 2)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first_weight, second_weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> list[Any]:
    return run_group(training.sharded, 2, folder)


def test_sharded_steps_are_those_of_one_process(sharded: list[Any]) -> None:
    expected = training.single_process(2)
    for found in sharded:
        assert_same_state(found["state"], expected, without=STATISTICS)


def test_a_sharded_checkpoint_goes_on_as_if_nothing_had_happened(sharded: list[Any]) -> None:
    # of running statistics, which differ by process, a checkpoint holds those of one
    for found in sharded:
        assert_identical([found["state"], found["again"]], without=STATISTICS)


def test_save_gathers_a_sharded_model(sharded: list[Any], folder: Path) -> None:
    """The file is that of an ordinary model: load it in one process, collapse it, verify it."""
    loaded = orepa.load(stock_net(), folder / "orepa.safetensors").eval()
    assert_identical([sharded[0]["again"], training.state_of(loaded)])
    assert orepa.verify(loaded, orepa.collapse(loaded), training.shard(0, 0)[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # as it is meant
def test_one_process_reads_what_two_sharded(sharded: list[Any], folder: Path) -> None:
    net = expanded_net()
    state = {"model": {name: torch.zeros_like(t) for name, t in net.state_dict().items()}}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    expected = training.single_process(2, steps=1)
    assert_same_state(training.numpy_of(state["model"]), expected, without=STATISTICS)


def test_what_needs_whole_parameters_says_so(sharded: list[Any]) -> None:
    assert sharded[0]["refusals"] == [
        "0: its parameters are DTensors, perhaps sharded; kernels_once needs whole ones: "
        "take an ordinary step",
        "the model's parameters are sharded (DTensor); orepa.save it in every process, and "
        "orepa.load the file in one",
    ]


def test_a_killed_process_costs_no_more_than_its_epoch(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for each in (undisturbed, disturbed):
        each.mkdir()
    expected = run_group(training.resumable, 2, undisturbed, None)
    killed = run_group(training.resumable, 2, disturbed, 1)
    assert killed[1] == Died(-9)
    found = run_group(training.resumable, 2, disturbed, None)
    assert [each["start"] for each in (*expected, *found)] == [0, 0, 1, 1]
    assert_identical([expected[0]["state"], found[0]["state"]])


def failing(rank: int, how: str) -> None:
    if rank == 1 and how == "raises":
        raise ValueError("on rank 1")
    if how == "hangs":
        time.sleep(60)


def test_a_group_that_fails_is_ended() -> None:
    with pytest.raises(ProcessError, match=r"(?s)rank 1:.*on rank 1"):
        run_group(failing, 2, "raises")
    with pytest.raises(ProcessError, match=r"gave nothing in 1\.0 s"):
        run_group(failing, 1, "hangs", timeout=1.0)


def test_synchronized_norms_before_and_after_expand() -> None:
    """torch runs them over processes on a GPU only; here, that they are norms as any other."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    plain = stock_net()
    before = orepa.expand(convert(stock_net()))
    after = convert(expanded_net())
    for model in (before, after):
        norms = [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms == [nn.SyncBatchNorm] * 3
        assert sum(isinstance(module, ConvBlock) for module in model.modules()) == 3
        with kernels_once(model):
            loss(model, training.shard(0, 0)[0]).backward()
        model.eval()
        deploy = orepa.collapse(model)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in deploy.modules())
        assert orepa.verify(model, deploy, training.shard(0, 0)[0])
        plain.load_state_dict(orepa.collapse(model, fold_norm=False).state_dict(), strict=True)


def test_inserted_norms_are_synchronized_too() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(orepa.expand(bare, block=orepa.OREPA))
    kinds = {type(m.norm) for m in model.modules() if isinstance(m, ConvBlock)}
    assert kinds == {nn.SyncBatchNorm}
