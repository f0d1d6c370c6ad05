"""Branches over the epochs: what is recorded is what they are, and what is wrong is said."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.errors import ReparamError
from orepa_compiler.training.branch_history import BlockSnapshot, BranchHistory, branch_snapshots
from tests.operator_factories import random_tensor
from tests.training_nets import expanded_net, loss, optimizer_of


@pytest.fixture
def net() -> nn.Sequential:
    model = expanded_net()
    assert isinstance(model, nn.Sequential)
    return model


def branches_of(net: nn.Sequential, index: int) -> Any:
    return net[index].branches


def test_norms_and_cosines_are_those_of_the_scaled_kernels(net: nn.Sequential) -> None:
    found = {block.path: block for block in branch_snapshots(net)}
    assert list(found) == ["0", "3", "6"]
    block, conv = found["3"], net[3]
    kernels = []
    for row, branch in enumerate(branches_of(net, 3).values()):
        kernel = torch.zeros(8, 2, 3, 3, dtype=torch.float64)
        own = branch.operator().weight.detach()
        kernel += own if own.shape[2] == 3 else nn.functional.pad(own, [1] * 4)
        kernels.append(kernel * conv.scaling[row].detach().reshape(-1, 1, 1, 1))  # type: ignore[index]
    assert block.branches == tuple(branches_of(net, 3))
    assert block.norms == pytest.approx([float(kernel.norm()) for kernel in kernels], rel=1e-6)
    assert sum(block.shares.values()) == pytest.approx(1)
    for i, left in enumerate(kernels):
        for j, right in enumerate(kernels):
            sizes = float(left.norm() * right.norm())
            expected = float((left * right).sum()) / sizes if sizes else 0.0
            assert block.similarity[i][j] == pytest.approx(expected, abs=1e-6)


def test_a_block_snapshot_reads_as_what_it_is() -> None:
    block = BlockSnapshot("a", ("x", "y"), (3.0, 1.0), ((1.0, -0.5), (-0.5, 1.0)))
    assert block.shares == {"x": 0.75, "y": 0.25}
    assert block.closest == (-0.5, "y", "x")
    assert BlockSnapshot("a", ("x",), (0.0,), ((0.0,),)).shares == {"x": 0.0}
    three = BlockSnapshot(
        "a", ("x", "y", "z"), (1.0, 1.0, 1.0), ((1.0, 0.5, 0.1), (0.5, 1.0, -0.9), (0.1, -0.9, 1.0))
    )
    assert three.closest == (-0.9, "z", "y")  # what opposes is as close as what agrees


def history_of(*snapshots: BlockSnapshot) -> BranchHistory:
    history = BranchHistory()
    history.epochs = {epoch: (block,) for epoch, block in enumerate(snapshots)}
    return history


def test_epochs_stay_in_their_order_however_they_come() -> None:
    early, late = block(1, 1), block(1, 3)
    history = BranchHistory()
    history.load_state_dict({7: [asdict(late)], 2: [asdict(early)]})
    assert list(history.epochs) == [2, 7]
    assert "epoch 2 -> 7" in str(history)
    assert "50 -> 25" in str(history)
    net = orepa.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    history.record(net, 4)
    assert list(history.epochs) == [2, 4, 7]
    assert "50 -> 25" in str(history)


def block(*norms: float, cosine: float = 0.0) -> BlockSnapshot:
    names = ("origin", "average", "frequency")[: len(norms)]
    rows = [[1.0 if i == j else 0.0 for j in range(len(norms))] for i in range(len(norms))]
    if len(norms) > 1:
        rows[0][1] = rows[1][0] = cosine
    return BlockSnapshot("layer1.conv", names, norms, tuple(map(tuple, rows)))


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ((block(1, 1, 1), block(1, 1, 1)), []),
        ((block(1, 1, 0),), []),  # the frequency filter starts there
        ((block(1, 1, 0), block(1, 1, 1)), []),
        ((block(1, 1, 1), block(1, 1, 0)), []),
        ((block(1, 1, 0), block(1, 1, 0)), ["frequency is dead (0.00 % of the norms)"]),
        (
            (block(1, 1, 1), block(99, 2, 0.5), block(99, 2, 0.5)),
            ["origin is alone (97.5 % of the norms)", "frequency is dead (0.49 % of the norms)"],
        ),
        (
            (block(1, 1, cosine=0.97), block(1, 1, cosine=-0.99)),
            ["origin and average train as one"],
        ),
        ((block(1, 1), block(999, 1)), []),  # alone, or as one, since this epoch only
        ((block(1, 1), block(1, 1, cosine=0.99)), []),
        ((block(1.0), block(1.0)), []),
        ((block(1, float("nan")),), ["a kernel is not finite"]),
        ((block(float("inf"), 1),), ["a kernel is not finite"]),
    ],
)
def test_findings(snapshots: tuple[BlockSnapshot, ...], expected: list[str]) -> None:
    (found,) = history_of(*snapshots).findings() or [""]
    assert bool(found) == bool(expected)
    assert all(text in found for text in expected)
    assert found.count("dead") + found.count("alone") == sum(
        text.count("dead") + text.count("alone") for text in expected
    )
    assert found.startswith("layer1.conv: ") or not expected


def test_a_branch_that_dies_in_training_is_found(net: nn.Sequential) -> None:
    history, optimizer = BranchHistory(), optimizer_of(net)
    average = list(branches_of(net, 3)).index("average")
    for epoch in range(3):
        loss(net, random_tensor(4, 3, 12, 12)).backward()
        optimizer.step()
        with torch.no_grad():
            net[3].scaling[average] *= 1e-3  # type: ignore[index]
        found = [text for text in history.record(net, epoch) if "average" in text]
        assert len(found) == (epoch > 0), "in two epochs in a row"
    assert found[0].startswith("3: average is dead (0.00 % of the norms)")


def test_the_table_and_its_text(net: nn.Sequential) -> None:
    history = BranchHistory()
    for epoch in (0, 4):
        history.record(net, epoch)
    lines = str(history).splitlines()
    assert lines[0] == "Share of each branch, epoch 0 -> 4, in %"
    assert lines[1].split()[:2] == ["block", "origin"]
    shares = branch_snapshots(net)[2].shares
    percent = f"{100 * shares['origin']:.0f}"
    (row,) = [line for line in lines if line.startswith("6 ")]
    assert row.split()[1:4] == [percent, "->", percent]
    console = Console(record=True, width=200)
    console.print(history)
    assert "closest pair" in console.export_text()


def test_a_checkpoint_carries_the_history(net: nn.Sequential, tmp_path: Path) -> None:
    history, again = BranchHistory(), BranchHistory()
    for epoch in range(2):
        history.record(net, epoch)
    torch.save(history.state_dict(), tmp_path / "history.pt")
    again.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    assert again.epochs == history.epochs


def test_the_plot(net: nn.Sequential, tmp_path: Path) -> None:
    history = BranchHistory()
    for epoch in range(2):
        history.record(net, epoch)
    for name in ("branches.png", "branches.svg"):
        path = history.plot(tmp_path / name)
        assert path == tmp_path / name
        start = path.read_bytes()[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<?xml ve")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_lightning_callback_records_in_the_first_process(net: nn.Sequential) -> None:
    history = BranchHistory()
    callback = history.callback()
    for epoch, is_first in ((3, True), (4, False)):
        trainer = SimpleNamespace(is_global_zero=is_first, current_epoch=epoch)
        callback.on_train_epoch_end(trainer, net)
    assert list(history.epochs) == [3]


def test_errors(net: nn.Sequential, tmp_path: Path) -> None:
    for call in (lambda: BranchHistory().plot(tmp_path / "x.png"), lambda: str(BranchHistory())):
        with pytest.raises(ReparamError) as error:
            call()
        assert str(error.value) == "nothing was recorded yet; call record(model, epoch) first"
    with pytest.raises(ReparamError) as error:
        BranchHistory().record(orepa.collapse(net), 0)
    assert str(error.value) == (
        "Sequential has no block, so it has no branches to look at; give a model that orepa.expand "
        "made"
    )
    sharded = type("DTensor", (torch.Tensor,), {})
    scaling = net[3].scaling.detach()  # type: ignore[operator,union-attr]
    net[3].scaling = nn.Parameter(scaling.as_subclass(sharded))  # type: ignore[assignment]
    with pytest.raises(ReparamError) as error:
        BranchHistory().record(net, 0)
    assert str(error.value) == (
        "3: its parameters are sharded (DTensor): look at the branches of a checkpoint, which "
        "orepa.save gathers"
    )
