"""The zoo's own logic: what is wrong gives a row that says so, and the page has its numbers."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import orepa_compiler as orepa
from benchmarks.zoo import checks, command, detection, examining, inputs, training
from benchmarks.zoo.building import Subject, shorten, subjects
from benchmarks.zoo.comparing import relative_error
from benchmarks.zoo.counting import convs_of, count_plan, normalised, watching_norms
from benchmarks.zoo.examining import Limits, Row, examine
from benchmarks.zoo.figures import CHECKED, draw, errors_of, spatial_shares
from benchmarks.zoo.report import report
from benchmarks.zoo.results import FAILED, Results
from benchmarks.zoo.running import run_all
from benchmarks.zoo.values import RECIPES, fill, settling

SUBJECT = Subject("timm", "tiny", "nets")
LIMITS = Limits(seconds=60, memory=100e9)


class Tiny(nn.Module):
    """Two convs with norms, one conv without, a head. gain: what the outputs are multiplied by."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x).relu())
        y = y + y * self.gate(y)
        return self.head(y.mean((2, 3))) * self.gain


def give(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> None:
    """Let every model of the zoo be this one, which knows no option of a constructor."""

    def build(subject: Subject, **options: Any) -> nn.Module:
        if options:
            raise TypeError("unexpected keyword argument")
        return make().eval()

    monkeypatch.setattr(inputs, "build", build)


def outcomes(row: Row) -> dict[str, str]:
    return {name: check["outcome"] for name, check in row["checks"].items()}


def test_a_right_model_passes_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Tiny)
    row = examine(SUBJECT, LIMITS)
    assert row["status"] == "pass", row
    assert set(outcomes(row).values()) == {"pass"}
    assert (row["convs"], row["spatial"], row["blocks"], row["convs_after"]) == (3, 2, 2, 3)
    assert (row["norms"], row["norms_behind_conv"], row["norms_after"]) == (2, 2, 0)
    assert row["plan"]["expanded"] == 2
    assert row["plan_all"]["expanded"] == 3
    assert list(row["plan"]["reasons"].values()) == [1]
    assert (row["size"], row["precision"]) == (96, "float32")


def spoiled(verb: Callable[..., nn.Module], **when: Any) -> Callable[..., nn.Module]:
    """The verb with a result that is wrong by a thousandth, where it is called so."""

    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        result = verb(model, **options)
        if when.items() <= options.items():
            with torch.no_grad():
                result.get_submodule("gate").weight.mul_(1.001)
        return result

    return wrong


@pytest.mark.parametrize(
    ("verb", "when", "wrong"),
    [("expand", {}, ["preserve"]), ("collapse", {"fold_norm": False}, ["stock"]),
     ("collapse", {}, ["collapse", "stock"])],
)  # fmt: skip
def test_a_wrong_result_fails_its_check_in_both_precisions(
    monkeypatch: pytest.MonkeyPatch, verb: str, when: dict[str, Any], wrong: list[str]
) -> None:
    give(monkeypatch, Tiny)
    monkeypatch.setattr(orepa, verb, spoiled(getattr(orepa, verb), **when))
    row = examine(SUBJECT, LIMITS)
    assert row["status"] == "fail"
    assert [name for name, outcome in outcomes(row).items() if outcome == "fail"] == wrong
    assert row["precision"] == "float64"
    assert row["float32"][wrong[0]] > 1e-5


def test_an_error_of_the_library_is_told_and_what_follows_is_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def expand(model: nn.Module, **options: Any) -> nn.Module:
        raise ValueError("no such luck")

    give(monkeypatch, Tiny)
    monkeypatch.setattr(orepa, "expand", expand)
    row = examine(SUBJECT, LIMITS)
    assert row["status"] == "fail"
    assert outcomes(row) == {
        "preserve": "error", "step": "not run", "collapse": "not run", "stock": "not run",
    }  # fmt: skip
    assert "no such luck" in report([row], {})


def test_a_refusal_to_give_back_the_stock_model_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoNorm(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())

    give(monkeypatch, NoNorm)
    row = examine(SUBJECT, LIMITS)
    assert row["status"] == "pass"
    assert outcomes(row)["stock"] == "refused"
    assert "a bias to go to, the original conv has none" in report([row], {})


def test_a_step_that_changes_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    monkeypatch.setattr(training, "_STEP", 0.0)
    monkeypatch.setattr(
        orepa, "expand", lambda model, **options: model
    )  # no norm, whose statistics would move
    row = examine(SUBJECT, LIMITS)
    assert row["checks"]["step"]["outcome"] == "fail"
    assert "changed the outputs by" in row["checks"]["step"]["message"]
    assert row["status"] == "fail"


@pytest.mark.parametrize(("gain", "outcome"), [(1e11, "pass"), (1e22, "fail")])
def test_large_gradients_are_finite_as_long_as_each_is(
    gain: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of 1e22 have squares beyond float32; a loss of 1e44 is beyond it itself."""
    give(monkeypatch, lambda: Tiny(gain))
    step = examine(SUBJECT, LIMITS)["checks"]["step"]
    assert step["outcome"] == outcome
    assert ("the gradients are not finite" in step["message"]) == (outcome == "fail")


def test_what_float32_cannot_show_is_checked_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Tiny)
    monkeypatch.setitem(checks.TOLERANCE, torch.float32, 0.0)
    row = examine(SUBJECT, LIMITS)
    assert (row["status"], row["precision"]) == ("pass", "float64")
    assert 0 < row["checks"]["preserve"]["error"] < 1e-10


def test_a_model_without_finite_or_varying_outputs_is_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gain, text in ((float("nan"), "NaN or inf"), (0.0, "signal 0.0e+00")):
        give(monkeypatch, lambda gain=gain: Tiny(gain))
        row = examine(SUBJECT, LIMITS)
        assert row["status"] == "not compared"
        assert text in row["why"]


def test_a_model_that_takes_no_input_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, lambda: nn.Sequential(nn.Conv2d(7, 4, 3)))
    row = examine(SUBJECT, LIMITS)
    assert row["status"] == "not compared"
    assert "expected input" in row["why"]


def test_a_model_without_a_conv_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, lambda: nn.Sequential(nn.Linear(3, 4)))
    row = examine(SUBJECT, LIMITS)
    assert row["status"] == "no conv"
    assert "0 (1 more have none)" in report([row], {})


def test_a_conv_that_the_plan_leaves_out_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Tiny)
    plan = orepa.plan
    monkeypatch.setattr(
        orepa, "plan", lambda m, **options: orepa.Plan(plan(m, **options).edits, ())
    )
    row = examine(SUBJECT, LIMITS)
    assert row["plan"]["silent"] == ["gate"]
    assert row["status"] == "fail"
    assert "1 convs neither expanded nor refused" in report([row], {})


def test_a_large_model_is_planned_whole_and_checked_with_blocks_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give(monkeypatch, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), *(Block() for _ in range(5))))
    row = examine(SUBJECT, Limits(60, 100e9, convs=3))
    assert row["status"] == "pass"
    assert (row["reduced_for"], row["reduced_by"]) == ("time", 3)
    assert (row["convs"], row["plan"]["expanded"], row["blocks"]) == (6, 5, 2)
    assert "3 blocks left out" in report([row], {})

    monkeypatch.setattr(examining, "_SURELY_SMALL", 0)
    row = examine(SUBJECT, Limits(60, 20e3))
    assert (row.get("reduced_for"), row.get("reduced_by")) == ("memory", 3), row


class Growing(nn.Module):
    """Its head reads what each of its blocks gives, so that none can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([block(x) for block in self.blocks], 1))


def test_a_model_of_which_no_block_can_be_left_out_is_checked_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give(monkeypatch, Growing)
    row = examine(SUBJECT, Limits(60, 100e9, convs=3))
    assert row["status"] == "pass"
    assert "reduced_for" not in row
    assert (row["convs"], row["blocks"]) == (6, row["plan"]["expanded"])


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def test_shortening_keeps_two_of_each_run() -> None:
    wide = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net = nn.Sequential(*(Block() for _ in range(4)), wide, *(Block() for _ in range(3)))
    assert shorten(net) == 3
    assert [type(child) for child in net] == [Block, Block, nn.Sequential, Block, Block]
    assert net(torch.ones(1, 4, 8, 8)).shape == (1, 4, 8, 8)
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert shorten(layers) == 0, "layers without children are no blocks"


def test_weights_are_seeded_and_no_gain_is_zero() -> None:
    net = fill(Tiny(), "a", RECIPES[0])
    again, other = fill(Tiny(), "a", RECIPES[0]), fill(Tiny(), "b", RECIPES[0])
    for key, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        assert "tracked" in key or not torch.equal(value, other.state_dict()[key])
    norm = nn.BatchNorm2d(64)
    nn.init.zeros_(norm.weight)
    fill(norm, "a", RECIPES[0])
    gains = norm.weight.detach()
    assert 0.5 <= float(gains.min()) < float(gains.max()) <= 1.5
    assert float(norm.running_mean.std()) > 0.1


def test_norms_settle_to_what_they_read_and_only_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)).eval()
    x = torch.randn(2, 3, 16, 16) * 100
    power = net[0](x).detach().square().mean((0, 2, 3))
    with settling(net), torch.no_grad():
        inside = net(x)
        net(x * 1000)
    assert not net[1]._forward_pre_hooks
    ratio = net[1].running_var / power
    assert 0.5 <= float(ratio.min()) < 0.8 < 1.2 < float(ratio.max()) <= 1.5
    shift = net[1].running_mean / power.sqrt()
    assert -0.5 <= float(shift.min()) < -0.2 < 0.2 < float(shift.max()) <= 0.5
    assert torch.equal(net(x).detach(), inside)


def test_relative_error_is_inf_for_what_cannot_be_compared() -> None:
    ones, inf = torch.ones(2), float("inf")
    assert relative_error([ones * 1.5], [ones]) == pytest.approx(0.5)
    assert relative_error([ones, ones], [ones, ones * 2]) == pytest.approx(0.5)
    assert relative_error([ones], [torch.ones(2, 1)]) == inf
    assert relative_error([ones * float("nan")], [ones]) == inf
    assert relative_error([], []) == inf
    assert relative_error([ones], [ones, ones]) == inf
    assert relative_error([ones], [ones * 0]) == inf
    assert relative_error([torch.tensor([1])], [torch.tensor([2])]) == inf
    assert relative_error([torch.tensor([1])], [torch.tensor([1])]) == 0


def test_spatial_convs_are_no_patch_embeddings_and_no_transposed_ones() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (1, 7)), nn.Conv2d(4, 4, 1),
        nn.ConvTranspose2d(4, 4, 3),
    )  # fmt: skip
    convs = convs_of(net)
    assert convs.all == {"0", "1", "2", "3", "4"}
    assert convs.spatial == {"1", "2"}
    assert convs.transposed == {"4"}
    counted = count_plan(convs, orepa.plan(net, where="1"))
    assert (counted["expanded"], counted["spatial_expanded"]) == (1, 1)
    assert counted["reasons"] == {"excluded by where=": 4}
    assert counted["spatial_reasons"] == {"excluded by where=": 1}


def test_reasons_lose_names_and_numbers() -> None:
    reason = "it is called 5 times, so what follows it is not one thing"
    assert normalised(reason) == "it is called N times, so what follows it is not one thing"
    reason = "the forward of layers.3 cannot be traced (TraceError: 3 is not 4)"
    assert normalised(reason) == "the forward of a module cannot be traced (TraceError)"
    assert normalised("no norm follows: add; ask for it with where=") == "no norm follows: add"


def test_norms_behind_a_conv_are_seen_in_the_run() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    with watching_norms(net) as seen, torch.no_grad():
        net(torch.ones(1, 3, 4, 4))
    assert (seen.total, seen.behind) == (2, {"1"})
    assert not net[0]._forward_hooks


def test_boxes_are_suppressed_as_torchvision_does() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 9.0]])
    kept = detection._suppressed(boxes, torch.tensor([0.5, 0.9, 0.1, 0.6]), 0.5)
    assert kept.tolist() == [1, 2]
    assert detection._suppressed(boxes, torch.tensor([0.5, 0.9, 0.1, 0.6]), 0.9).tolist() == [
        1, 3, 0, 2,
    ]  # fmt: skip


def test_every_model_of_both_libraries_is_a_subject() -> None:
    every = subjects("*")
    assert len(every) == 1371 + 121
    assert [s.key for s in subjects("torchvision:resnet18", "test_vit")] == [
        "timm:test_vit", "torchvision:resnet18",
    ]  # fmt: skip
    (detector,) = subjects("ssd300_vgg16")
    assert detector.family == "detection"


def behave(subject: Subject, limits: Limits) -> Row:
    """What a process of the zoo may do, named by the model."""
    if subject.name == "raises":
        raise KeyError("a reason")
    if subject.name == "exits":
        os._exit(3)
    if subject.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if subject.name == "prints":
        os.write(2, b"last words\n")
        os._exit(4)
    if subject.name == "sleeps":
        time.sleep(60)
    if subject.name == "eats":
        held = torch.ones(400_000_000)
        time.sleep(60)
        del held
    return {"library": "timm", "name": subject.name, "family": "", "status": "pass"}


def rows_of(*names: str, **limits: float) -> dict[str, Row]:
    wanted = [Subject("timm", name, "") for name in names]
    given = Limits(limits.get("seconds", 60.0), limits.get("memory", 100e9))
    return {row["name"]: row for row in run_all(wanted, behave, given)}


def test_a_process_that_dies_gives_a_row() -> None:
    rows = rows_of("fine", "raises", "exits", "killed", "prints")
    assert {name: row["status"] for name, row in rows.items()} == {
        "fine": "pass", "raises": "crash", "exits": "crash", "killed": "crash", "prints": "crash",
    }  # fmt: skip
    assert "a reason" in rows["raises"]["why"]
    assert "code 3" in rows["exits"]["why"]
    assert "code -9" in rows["killed"]["why"]
    assert "last words" in rows["prints"]["why"]


def test_a_process_over_its_limits_is_ended_and_gives_a_row() -> None:
    start = time.perf_counter()
    rows = rows_of("sleeps", "fine", seconds=0.5)
    assert rows["sleeps"]["status"] == "time"
    assert "longer than 0.5 s" in rows["sleeps"]["why"]
    assert rows["fine"]["status"] == "pass"
    rows = rows_of("eats", memory=1.5e9)
    assert rows["eats"]["status"] == "memory"
    assert "more than 1.5 GB" in rows["eats"]["why"]
    assert time.perf_counter() - start < 30


def test_rows_are_kept_and_made_again_when_asked(tmp_path: Path) -> None:
    results = Results(tmp_path / "folder" / "zoo.json")
    for status in sorted(FAILED | {"pass"}):
        results.add({"library": "timm", "name": status, "status": status, "source": "a"})
    results.add(
        {"library": "timm", "name": "deep", "status": "pass", "reduced_for": "time", "source": "b"}
    )
    results.save()
    again = Results(tmp_path / "folder" / "zoo.json")
    assert again.rows == results.rows
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["zoo.json"]
    assert again.is_due("timm:other", "none", "a")
    assert not again.is_due("timm:fail", "none", "a")
    assert {n for n in FAILED if again.is_due(f"timm:{n}", "failed", "a")} == FAILED
    assert not again.is_due("timm:pass", "failed", "a")
    again.add({"library": "timm", "name": "odd", "status": "not compared"})
    assert again.is_due("timm:odd", "failed", "a")
    assert again.is_due("timm:deep", "reduced", "a")
    assert not again.is_due("timm:pass", "reduced", "a")
    assert again.is_due("timm:deep", "old", "a")
    assert not again.is_due("timm:pass", "old", "a")
    assert [again.urgency(f"timm:{n}") for n in ("other", "fail", "deep", "pass")] == [0, 0, 1, 2]
    assert again.is_due("timm:pass", "all", "a")


def test_a_second_run_continues_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Subject("timm", "fine", ""), Subject("timm", "raises", "")]
    monkeypatch.setattr(command, "subjects", lambda *only: known)
    monkeypatch.setattr(command, "examine", behave)
    monkeypatch.setattr(command.signal, "signal", lambda *handler: None)
    files = ["--output", str(tmp_path / "zoo.json"), "--docs", str(tmp_path / "zoo.md")]
    first = CliRunner().invoke(command.app, files)
    assert first.exit_code == 1, first.output
    assert "2 rows, 1 failed" in " ".join(first.output.split())
    monkeypatch.setattr(command, "run_all", lambda due, *rest, **options: iter([]))
    assert "0 of" not in CliRunner().invoke(command.app, files).output
    seen: list[Any] = []
    monkeypatch.setattr(
        command, "run_all", lambda due, *rest, **options: iter(seen.append(due) or [])
    )
    CliRunner().invoke(command.app, files)
    CliRunner().invoke(command.app, [*files, "--redo", "failed"])
    assert seen == [[], known[1:]]
    page = (tmp_path / "zoo.md").read_text()
    assert "raises" in page
    pictures = re.findall(r"\]\((.*?\.svg)\)", page)
    assert len(pictures) == 2
    assert all((tmp_path / picture).stat().st_size for picture in pictures)
    wrong = CliRunner().invoke(command.app, [*files, "--redo", "some"])
    assert "'some' is none of none, failed" in " ".join(wrong.output.replace("│", "").split())


def row_of(name: str, status: str, **changes: Any) -> Row:
    check = {"outcome": "pass", "error": 2e-7, "message": ""}
    plan = {"expanded": 3, "spatial_expanded": 2, "reasons": {"no norm follows: add": 1},
            "spatial_reasons": {}, "silent": []}  # fmt: skip
    return {
        "library": "timm", "name": name, "family": "nets", "status": status, "parameters": 10**9,
        "convs": 4, "spatial": 2, "plan": plan, "plan_all": {**plan, "expanded": 4, "reasons": {}},
        "checks": dict.fromkeys(checks.CHECKS, check), "precision": "float32", "total_s": 5.0,
        "norms": 5, "norms_after": 2, "norms_behind_conv": 3, "norms_behind_conv_after": {},
        "source": "a", **changes,
    }  # fmt: skip


def test_the_page_has_the_numbers() -> None:
    worse = {"outcome": "fail", "error": 3e-3, "message": ""}
    bad = row_of("b", "fail", checks={**row_of("b", "fail")["checks"], "collapse": worse},
                 norms_behind_conv_after={"norm1": "why"})  # fmt: skip
    half = row_of("c", "pass", precision="float64", sibling="small", reduced_for="memory",
                  meta_plan_s=7.25)  # fmt: skip
    gone = {"library": "timm", "name": "d", "family": "nets", "status": "time", "why": "too long"}
    rows = [row_of("a", "pass"), bad, half, gone]
    text = report(rows, {"machine": "a good one", "source": "a"})
    for line in (
        "| models with a conv | 4 (0 more have none) |",
        "| pass | 2 of 4 (50.0 %) |",
        "| of these, checked at reduced depth to save time or memory | 1 |",
        "| fail | 2 |",
        "| pass in float64, because float32 is noisier | 1 |",
        "| convs expanded by default | 9 of 12 (75.0 %) |",
        '| convs expanded with `where="**"` | 12 of 12 (100.0 %) |',
        "| spatial convs expanded by default | 6 of 6 (100.0 %) |",
        "| batch norms | 15 |",
        "| of these, not folded by `collapse` | 6 of 15 (40.0 %) |",
        "| batch norms directly after a conv or linear layer | 9 |",
        "| of these, not folded by `collapse` | 1 |",
        "| no norm follows: add | 3 | 0 | 0 | 0 |",
        "| timm b | fail | collapse: fail 3.0e-03 |",
        "| why | 1 | b (1) |",
        "| timm d | time | too long |",
        "| timm c | 1,000 M | memory | small | 7.2 |",
        "| machine | a good one |",
        "| rows | 3 of 4 from this version of the source, the others from 1 earlier ones |",
    ):
        assert line in text, line
    assert (
        "| timm | nets | 4 | 2 | 12 | 9 | 6 | 6 | 3 no norm follows: add | 3.0e-03 | 2.0e-07 |"
        in text
    )


def test_the_figures_tell_what_the_rows_do() -> None:
    worse = {**row_of("b", "fail")["checks"], "step": {"error": 1.0}, "stock": {"error": None}}
    rows = [
        row_of("a", "pass"),
        row_of("b", "fail", checks=worse),
        row_of("c", "pass", precision="float64", library="torchvision", spatial=8),
        row_of("d", "pass", spatial=0),
        {"library": "timm", "name": "e", "family": "nets", "status": "time", "why": "too long"},
    ]
    assert errors_of(rows, "float32") == {
        "preserve": [2e-7] * 3, "collapse": [2e-7] * 3, "stock": [2e-7] * 2
    }  # fmt: skip
    assert errors_of(rows, "float64") == {check: [2e-7] for check in CHECKED}
    assert spatial_shares(rows) == [("nets", 4, 4), ("torchvision nets", 2, 8)]


def test_figures_are_drawn_of_any_rows(tmp_path: Path) -> None:
    for rows in ([], [row_of("a", "pass")], [row_of("a", "pass", spatial=9)]):
        for path in draw(rows, tmp_path):
            assert path.read_text().startswith("<?xml")
    first = [path.read_bytes() for path in draw(rows, tmp_path)]
    assert first == [path.read_bytes() for path in draw(rows, tmp_path)]


def test_an_error_is_told_without_a_path_of_the_machine() -> None:
    with pytest.raises(ValueError, match="nothing to stack") as raised:
        examine_nothing()
    said = checks.described(raised.value)
    assert 'File "tests/benchmarks/test_zoo.py"' in said
    assert said.endswith("ValueError: nothing to stack\n")
    assert 'File "/' not in said


def examine_nothing() -> None:
    try:
        torch.stack([])
    except RuntimeError as error:
        raise ValueError("nothing to stack") from error
