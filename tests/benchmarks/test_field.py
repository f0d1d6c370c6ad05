"""The field's blocks: each is collapsed to what it must be, or refused with its border named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks.field import command
from benchmarks.field.blocks import BLOCKS
from benchmarks.field.counting import counted
from benchmarks.field.examining import Row, _rounding, error, examine, examine_block, is_sound
from benchmarks.field.registry import Published, conv_norm, published
from benchmarks.field.report import report, table
from benchmarks.zoo.building import Subject


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_published_block(block: Published) -> None:
    row = examine_block(block)
    assert row["status"] == ("refused" if block.refused else "collapsed"), row
    assert row["after"]["convs"] == block.convs
    assert row["after"]["norms"] == row["after"]["behind"] == 0
    assert row["after"]["macs"] <= row["before"]["macs"]
    assert row["float64"] <= 1e-12
    assert row["float32"] <= 1e-5
    assert row["adopted"] == 0
    assert any((block.refused or "") in reason for reason in ["", *row["reasons"]])
    assert bool(row["reasons"]) == (block.refused is not None)


def sound() -> Row:
    counts = {"convs": 1, "macs": 10, "norms": 0, "behind": 0}
    errors = {"float64": 1e-15, "float32": 1e-7, "noise": 1e-7, "adopted": 0}
    return {"before": counts, "after": counts, **errors}


@pytest.mark.parametrize(
    "worse",
    [
        {"float64": 1e-11},
        {"float32": 1e-4},
        {"after": {"convs": 1, "macs": 11, "norms": 0, "behind": 0}},
        {"after": {"convs": 1, "macs": 10, "norms": 1, "behind": 1}},
        {"adopted": 1, "float64": 1e-4},
    ],
)
def test_what_makes_a_row_fail(worse: Row) -> None:
    assert is_sound(sound())
    assert not is_sound(sound() | worse)


def test_a_net_that_amplifies_rounding_is_allowed_its_own_error() -> None:
    assert is_sound(sound() | {"float32": 1.9e-4, "noise": 1e-4})
    assert not is_sound(sound() | {"float32": 2.1e-4, "noise": 1e-4})
    assert is_sound(sound() | {"float64": 3.9e-11, "rounding": 1e-11})
    assert not is_sound(sound() | {"float64": 4.1e-11, "rounding": 1e-11})
    assert not is_sound(sound() | {"float64": 1e-11, "noise": 1.0}), "float32 excuses nothing there"


def test_what_rounding_does_is_measured_where_an_error_is_large() -> None:
    """x (1 + 1e8 - 1e8): an ulp of the weight 1e8 is 1e-8 of the output."""
    first, second = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(first.weight, 1e8)
    nn.init.constant_(second.weight, -1e8 + 1)

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    inputs = (torch.ones(1, 1, dtype=torch.float64),)
    truth = [torch.ones(1, 1, dtype=torch.float64)]
    assert 1e-9 < _rounding(Cancelling(), inputs, truth) < 1e-7
    assert (
        examine(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), (torch.randn(1, 3, 8, 8),))["rounding"]
        is None
    )


def test_errors() -> None:
    one, two = torch.ones(2, 3), torch.tensor([[1.0, 1.5, 1.0], [1.0, 2.0, 1.0]])
    assert error([one], [two]) == 0.5
    assert error([two], [one]) == 1.0
    assert error([one], [one, two]) == float("inf")
    assert error([one[:1]], [one]) == float("inf")
    assert error([one / 0], [one]) == float("inf")


class Readers(nn.Module):
    """A conv with a norm that reads it alone, and one whose output another reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.shared = conv_norm(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(self.alone(x))
        return self.norm(y) + y


def test_counts() -> None:
    found = counted(Readers().eval(), (torch.randn(1, 4, 9, 9),))
    assert (found.convs, found.norms, found.behind) == (2, 2, 1)
    assert found.macs == 4 * 4 * 9 * (7 * 7 + 3 * 3)
    up = counted(nn.ConvTranspose2d(4, 2, 3, stride=2), (torch.randn(1, 4, 5, 5),))
    assert up.macs == 4 * 2 * 9 * 5 * 5


def test_a_block_that_is_not_what_it_should_be_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.field.registry.BLOCKS", {})
    one = Published("one", "here", lambda: conv_norm(4, 4, 3), 2, (4, 8, 8))
    assert examine_block(one)["status"] == "fail"
    free = Published("free", "here", lambda: conv_norm(4, 4, 3), 1, (4, 8, 8), "border: none")
    assert examine_block(free)["status"] == "fail"
    make = published("new", "here")(lambda: conv_norm(4, 4, 3))
    assert isinstance(make(), nn.Sequential)


@pytest.fixture(scope="module")
def peer_row() -> Row:
    from benchmarks.field.peers import examine_peer

    subject = Subject("timm", "repghostnet_050", "repghost")
    return examine_peer(subject, command.LIMITS)


def test_a_model_of_timm_beside_timms_own_way(peer_row: Row) -> None:
    assert peer_row["status"] == "collapsed"
    assert peer_row["after"]["norms"] == peer_row["after"]["behind"] == 0
    assert peer_row["timm"]["after"]["norms"] == 48
    assert peer_row["float64"] <= 1e-12
    assert peer_row["timm"]["float64"] <= 1e-12


def test_a_model_with_more_norms_than_timm_leaves_fails(peer_row: Row) -> None:
    from benchmarks.field.peers import _is_no_worse

    timm = {**peer_row["timm"], "after": {**peer_row["after"], "norms": -1}}
    assert _is_no_worse(peer_row)
    assert not _is_no_worse({**peer_row, "timm": timm})
    assert not _is_no_worse({**peer_row, "float32": 1e-3})
    assert _is_no_worse({**peer_row, "timm": {"float32_problem": "RuntimeError"}})


def test_timms_classes_are_found() -> None:
    from benchmarks.field.peers import classes

    names = {cls.__name__ for cls in classes()}
    assert {"RepVggBlock", "MobileOneBlock", "RepMixer", "GhostModuleV3", "RepVggDw"} <= names


def test_the_page(peer_row: Row) -> None:
    blocks = [examine_block(BLOCKS[name]) for name in ("DBB", "refused: two padded 3 x 3")]
    text = report([*blocks, peer_row], {"torch": "2"})
    assert "| published blocks collapsed as they should be | 1 of 2 |" in text
    assert "| models of timm collapsed | 1 of 1 |" in text
    assert "| DBB | Ding et al., CVPR 2021 | 1 | 5 -> 1 | 6 -> 0 | 0 | 507,904 -> 221,184 |" in text
    assert "border: padding (1, 1) before the second conv cuts off" in text
    assert "| repghostnet_050 | repghost.RepGhostModule | 80 |" in text
    assert table(blocks).row_count == 2


def test_the_command(tmp_path: Path) -> None:
    paths = ["--output", str(tmp_path / "f.json"), "--docs", str(tmp_path / "f.md")]
    run = CliRunner().invoke(command.app, ["--only", "DBB*", "--no-timm", *paths])
    assert run.exit_code == 0, run.output
    assert run.output.count("collapsed") == 3
    assert not list(tmp_path.iterdir())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, peer_row: Row) -> list[str]:
    """One block; of timm a model that is there, one whose process dies, and a large one."""
    asked: list[str] = []

    def run_all(subjects: list[Subject], *_: object, **__: object) -> Iterator[Row]:
        for subject in subjects:
            asked.append(subject.name)
            died = {"name": subject.name, "status": "crash", "why": "it ended"}
            yield peer_row if subject.name == peer_row["name"] else died

    models = [Subject("timm", name, "family") for name in ("dies", peer_row["name"], "huge")]
    monkeypatch.setattr(command, "BLOCKS", {"DBB": BLOCKS["DBB"]})
    monkeypatch.setattr(command, "peers", lambda: (models[:2], models[2:]))
    monkeypatch.setattr(command, "run_all", run_all)
    return asked


def test_the_command_writes_whole_pages_and_goes_on(tmp_path: Path, few: list[str]) -> None:
    paths = ["--output", str(tmp_path / "f.json"), "--docs", str(tmp_path / "f.md")]
    run = CliRunner().invoke(command.app, paths)
    assert run.exit_code == 1, "one model died"
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["DBB", "dies", "repghostnet_050", "huge"]
    text = (tmp_path / "f.md").read_text()
    assert "| dies | crash | it ended |" in text
    assert "| huge | not run | more than 400 M parameters |" in text
    assert "| failed | 1 |" in text
    assert "| not run | 1 |" in text
    assert "| repghost | 1 | 1 |" in text
    assert few == ["dies", "repghostnet_050"]
    CliRunner().invoke(command.app, paths)
    assert few == ["dies", "repghostnet_050", "dies"], "a row that is there is kept"
    old = json.loads((tmp_path / "f.json").read_text())
    old["environment"]["source"] = "another"
    (tmp_path / "f.json").write_text(json.dumps(old))
    CliRunner().invoke(command.app, paths)
    assert few[3:] == ["dies", "repghostnet_050"], "rows of another version are made again"


def test_timms_models_are_those_with_such_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _registry

    from benchmarks.field import peers

    names = ("repvgg_a0", "repvgg_b3", "levit_128s", "repvit_m1", "fastvit_t8", "fastvit_mci4")
    known = {name: _registry._model_to_module[name] for name in (*names, "resnet18")}
    monkeypatch.setattr(_registry, "_model_to_module", known)  # building all takes half a minute
    monkeypatch.setattr(peers, "MOST_PARAMETERS", 100e6)
    small, large = ({subject.name for subject in part} for part in peers.peers())
    assert {"repvgg_a0", "levit_128s", "repvit_m1", "fastvit_t8"} <= small
    assert "resnet18" not in small | large
    assert {"repvgg_b3", "fastvit_mci4"} <= large
