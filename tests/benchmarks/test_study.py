"""The study's own logic: runs are paired, its numbers are scipy's, its page is the lines'."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import nn
from typer.testing import CliRunner

import orepa_compiler as orepa
from benchmarks.study import command, training
from benchmarks.study.arms import ARMS
from benchmarks.study.budget import Form, at_equal_time, epochs_for
from benchmarks.study.cells import SEEDS, TUNING_SEEDS, Question, needed, progress
from benchmarks.study.data import FASHION_FOLDER, GIVEN_TEST, flipped, load, shifted, split
from benchmarks.study.nets import NETS
from benchmarks.study.normalized import normalized
from benchmarks.study.preconditioned import diagonally_preconditioned, preconditioned
from benchmarks.study.proposition import largest_departure
from benchmarks.study.questions import QUESTIONS
from benchmarks.study.report import COLUMNS, lines, rows, section, table
from benchmarks.study.runs import Records, Run
from benchmarks.study.statistics import paired
from benchmarks.study.training import make_net, train
from orepa_compiler.blocks import ConvBlock

RUN = Run("digits", "ResNet-8", "plain", 0.1, 0, epochs=1, train=100)
SMALL = [name for name in NETS if name != "EfficientNet-Lite0"]  # 3 M parameters, and 64 x 64
OTHERWISE = {"loss": 0.5, "similarity": None}
MARKS = (
    "<!-- study: small nets: begin -->\nold\n<!-- study: small nets: end -->\nbetween\n"
    "<!-- study: few images: begin -->\n<!-- study: few images: end -->\n"
)
ASKED = Question("Title", "Asks.", ("ResNet-8",), ("plain", "DBB"), rates=(0.1, 0.3), data="digits")


def test_no_image_of_the_test_trains_or_validates_and_the_test_is_always_the_same() -> None:
    first, second = (split("digits", train=500, seed=seed) for seed in (0, 1))
    assert torch.equal(first.test[0], second.test[0])
    assert not torch.equal(first.train[0], second.train[0])
    for part in (first, second):
        sizes = [len(images) for images, _ in (part.train, part.validation, part.test)]
        assert sizes[0] == 500
        assert sum(sizes) == 1797
        together = torch.cat([part.train[0], part.validation[0], part.test[0]])
        assert len(together.flatten(1).unique(dim=0)) == len(
            torch.cat([first.train[0], first.validation[0], first.test[0]]).flatten(1).unique(dim=0)
        )


def test_too_many_images_to_train_are_an_error() -> None:
    with pytest.raises(ValueError, match="digits: 1200 images to train of 1079"):
        split("digits", train=1200, seed=0)


def test_images_move_by_whole_pixels_and_a_seed_repeats_them() -> None:
    images = torch.randn(50, 1, 8, 8)
    moved, again = (shifted(images, torch.Generator().manual_seed(3), 1) for _ in range(2))
    assert torch.equal(moved, again)
    assert not torch.equal(moved, images)
    assert torch.allclose(moved.sum((1, 2, 3)), images.sum((1, 2, 3)), atol=1e-4)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.startswith("OREPA, preserve")])
def test_arms_that_preserve_start_at_the_plain_net_of_their_seed(arm: str) -> None:
    images = split("digits", train=100, seed=0).train[0][:8]
    start, own = (make_net(replace(RUN, arm=name), images).eval() for name in ("plain", arm))
    assert any(isinstance(module, ConvBlock) for module in own.modules())
    torch.testing.assert_close(own(images), start(images), rtol=1e-4, atol=1e-5)
    scale = [m.scaling[1:].abs().max() for m in own.modules() if isinstance(m, ConvBlock)]
    assert (max(scale) == 0) == (arm == "OREPA, preserve 0")


@pytest.mark.parametrize("net", SMALL)
@pytest.mark.parametrize("size", [8, 28])
def test_every_net_gives_ten_classes(net: str, size: int) -> None:
    assert NETS[net](size)(torch.randn(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_differs_from_the_plain_net_and_collapses_to_it(arm: str) -> None:
    images = split("digits", train=100, seed=0).train[0][:8]
    net = make_net(replace(RUN, arm=arm, net="ResNet-8, 7 x 7 stem", width=4), images)
    has_blocks = arm not in ("plain", "gradient", "gradient, diagonal")
    assert any(isinstance(m, ConvBlock) for m in net.modules()) == has_blocks
    deploy = orepa.collapse(net.double().eval())
    torch.testing.assert_close(deploy(images.double()), net(images.double()), rtol=1e-8, atol=1e-8)
    assert not any(isinstance(m, (ConvBlock, nn.BatchNorm2d)) for m in deploy.modules())


def test_the_stock_branches_are_those_that_the_arms_leave_out() -> None:
    images = split("digits", train=100, seed=0).train[0][:8]
    for name in set(orepa.OREPA.branches) - {"origin"}:
        net = make_net(replace(RUN, arm=f"without {name}"), images)
        branches = [set(m.branches) for m in net.modules() if isinstance(m, ConvBlock)]
        assert branches
        assert all(found == set(orepa.OREPA.branches) - {name} for found in branches)


@pytest.mark.parametrize("centred", [False, True])
def test_a_normalized_kernel_has_norm_one_per_output_channel(centred: bool) -> None:
    block = normalized(orepa.OREPA, centred=centred)
    net = orepa.expand(nn.Conv2d(4, 6, 3), block=block, init="paper", where="**")
    (made,) = (m for m in net.modules() if isinstance(m, ConvBlock))
    operators = made.branch_operators()
    assert operators.keys() == orepa.OREPA.branches.keys()
    for name, operator in operators.items():
        weight = operator.weight.flatten(1)
        alive = weight.norm(dim=1) > 0.1  # a filter may be zero on all taps
        torch.testing.assert_close(weight.norm(dim=1)[alive], torch.ones(int(alive.sum())))
        assert alive.any(), name
        assert not centred or weight.mean(1).abs().max() < 1e-6


def test_scaling_from_data_gives_every_branch_a_spread_of_one() -> None:
    images = split("digits", train=100, seed=0).train[0][:50]
    net = make_net(replace(RUN, arm="scaled from data"), images)
    first = next(m for m in net.modules() if isinstance(m, ConvBlock))
    for factor, branch in zip(first.scaling, first.branches.values(), strict=True):
        spread = (factor.reshape(1, -1, 1, 1) * branch.operator()(images)).std((0, 2, 3))
        alive = spread > 0.1  # a filter may be zero on all taps
        torch.testing.assert_close(spread[alive], torch.ones(int(alive.sum())))
        assert alive.any()


def test_a_run_can_be_repeated_to_the_bit() -> None:
    first, second = train(RUN), train(RUN)
    assert first["accuracy"] == second["accuracy"]
    assert first["loss"] == second["loss"]
    assert train(replace(RUN, seed=1))["loss"] != first["loss"]


@pytest.mark.parametrize(
    "other",
    [
        *({"rate": 0.3}, {"warmup": 1, "epochs": 2}, {"weight_decay": 0.1}, {"batch": 25}),
        *({"width": 8}, {"optimizer": "AdamW"}),
    ],
)
def test_every_field_of_a_run_has_an_effect(other: dict[str, object]) -> None:
    base = replace(RUN, epochs=2)
    assert train(replace(base, **other))["loss"] != train(base)["loss"]  # type: ignore[arg-type]


def test_decay_of_scaling_layers_acts_on_them_alone() -> None:
    base = replace(RUN, arm="OREPA, paper", weight_decay=0.1)
    assert train(base)["loss"] != train(replace(base, scaling_decays=True))["loss"]
    plain = replace(RUN, weight_decay=0.1)
    assert train(plain)["loss"] == train(replace(plain, scaling_decays=True))["loss"]


def test_a_difference_is_that_of_the_paired_test_of_scipy() -> None:
    own, base = [92.0, 93.5, 91.4, 94.2, 92.7], [91.0, 92.9, 91.3, 93.0, 92.0]
    found, known = paired(own, base), ttest_rel(own, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.mean == pytest.approx(0.72)
    assert found.verdict == "better"
    assert paired(base, own).verdict == "worse"
    assert paired([1.0, 2.0], [1.1, 1.8]).verdict == "no difference shown"
    with pytest.raises(ValueError, match="3 and 2 runs"):
        paired([1.0, 2.0, 3.0], [1.0, 2.0])


def records(tmp_path: Path, best: dict[str, float]) -> Records:
    """Made-up lines of ASKED: each arm is best at the given rate, and DBB a point better."""
    made = Records(tmp_path / "lines.jsonl")
    while runs := needed(ASKED, made):
        for run in runs:
            accuracy = 90 + (run.arm == "DBB") + 5 * (run.rate == best[run.arm]) + 0.1 * run.seed
            made.add(run, {"accuracy": accuracy, "loss": 0.5, "similarity": None})
    return made


def test_each_arm_is_measured_at_the_rate_that_its_own_tuning_chose(tmp_path: Path) -> None:
    made = records(tmp_path, {"plain": 0.1, "DBB": 0.3})
    assert [(line.cell.arm, line.rate) for line in lines(ASKED, made)] == [
        ("plain", 0.1),
        ("DBB", 0.3),
    ]
    assert progress(ASKED, made) == (38, 38)
    tuned = {(run.arm, run.rate) for run in made.known if run.held == "validation"}
    wider = {("plain", 0.03), ("DBB", 1.0)}  # the best of the first was the last on its side
    assert tuned == {(arm, rate) for arm in ASKED.arms for rate in ASKED.rates} | wider
    measured = [run for run in made.known if run.held == "test"]
    assert {run.seed for run in measured} == set(SEEDS)
    assert {run.seed for run in made.known if run.held == "validation"} == set(TUNING_SEEDS)
    plain, other = rows(lines(ASKED, made))
    assert plain[4:10] == ("0.500", "95.45 ± 0.30", "base", "-", "-", "-")
    assert other[6] == "+1.00"
    assert table(lines(ASKED, made))[0] == tuple(  # one setting, and no branches to compare
        name for name in COLUMNS if name not in ("setting", "similarity", "pairs")
    )
    assert other[8:10] == ("10", "better")


def test_a_rate_that_is_behind_by_more_than_the_margin_gets_no_further_seed(
    tmp_path: Path,
) -> None:
    asked = replace(ASKED, arms=("plain",), rates=(0.03, 0.1, 0.3), margin=1.0)
    made, behind = Records(tmp_path / "lines.jsonl"), {0.03: 3.0, 0.1: 0.0, 0.3: 0.9, 1.0: 3.0}
    while runs := needed(asked, made):
        for run in runs:
            turned = 2.0 * (run.rate == 0.3 and run.seed > TUNING_SEEDS[0])
            made.add(run, {"accuracy": 90 + turned - behind[run.rate], **OTHERWISE})
    tuned = [(run.rate, run.seed) for run in made.known if run.held == "validation"]
    first, *others = TUNING_SEEDS
    assert sorted(tuned) == sorted(
        [*((rate, first) for rate in behind), *((r, s) for r in (0.1, 0.3) for s in others)]
    )
    assert {run.rate for run in made.known if run.held == "test"} == {0.3}
    assert progress(asked, made) == (8 + len(SEEDS), 8 + len(SEEDS))


def test_lines_on_disk_are_gone_on_with(tmp_path: Path) -> None:
    made = records(tmp_path, {"plain": 0.1, "DBB": 0.3})
    text = made.path.read_text().splitlines()
    made.path.write_text("\n".join(text[:-3]) + "\n")
    again = Records(made.path)
    assert len(needed(ASKED, again)) == 3
    assert progress(ASKED, again) == (35, 38)
    assert "35 of 38 runs are done" in section("asked", ASKED, again)
    assert "pairs" not in section("asked", ASKED, made)


def test_pairs_that_are_there_are_compared_and_counted(tmp_path: Path) -> None:
    made = records(tmp_path, {"plain": 0.1, "DBB": 0.3})
    for line in lines(ASKED, made):
        for run in line.cell.measured(line.rate or 0)[4 if line.cell.arm == "plain" else 6 :]:
            del made.known[run]
    plain, other = lines(ASKED, made)
    assert len(plain.accuracies) == 4
    assert len(other.accuracies) == 6
    assert other.difference is not None
    assert other.difference.n == 4
    heads, _, row = table([plain, other])
    assert row[heads.index("pairs")] == "4"
    for run in plain.cell.measured(0.1)[1:]:
        made.known.pop(run, None)
    (alone,) = lines(ASKED, made)
    assert alone.cell.arm == "DBB"
    assert alone.difference is None


def test_a_run_that_diverged_is_told(tmp_path: Path) -> None:
    made = records(tmp_path, {"plain": 0.1, "DBB": 0.3})
    run = lines(ASKED, made)[1].cell.measured(0.3)[0]
    made.add(run, {**made.known[run], "loss": None})
    assert rows(lines(ASKED, made))[1][9] == "1 of 10 diverged"


def test_several_nets_are_averaged_seed_by_seed(tmp_path: Path) -> None:
    asked, made = replace(ASKED, nets=("ResNet-8", "VGG-7")), Records(tmp_path / "lines.jsonl")
    gain = {"ResNet-8": 1.0, "VGG-7": 3.0}
    while runs := needed(asked, made):
        for run in runs:
            helped = gain[run.net] + 0.01 * run.seed if run.arm == "DBB" else 0.0
            accuracy = 90 + helped + 0.1 * run.seed - 9 * (run.rate != 0.1)
            made.add(run, {"accuracy": accuracy, "loss": 0.5, "similarity": 0.25})
    base, own = lines(asked, made)[-2:]
    assert base.accuracies == pytest.approx([90 + 0.1 * seed for seed in SEEDS])
    known = ttest_rel(own.accuracies, base.accuracies).confidence_interval(0.95)
    assert own.difference is not None
    assert own.difference.mean == pytest.approx(2.045)
    assert (own.difference.low, own.difference.high) == pytest.approx((known.low, known.high))
    assert rows([base, own])[1][:4] == ("all nets", "-", "DBB", "-")
    lost = next(run for run in made.known if run.net == "VGG-7" and run.held == "test")
    del made.known[lost]
    assert "all nets" not in {line.cell.net for line in lines(asked, made) if line.difference}


def test_an_arm_whose_base_was_not_made_is_not_called_a_base(tmp_path: Path) -> None:
    made = records(tmp_path, {"plain": 0.1, "DBB": 0.3})
    for run in lines(ASKED, made)[0].cell.measured(0.1):
        del made.known[run]
    (line,) = rows(lines(ASKED, made))
    assert line[2] == "DBB"
    assert set(line[6:10]) == {"-"}


def test_a_setting_can_be_compared_with_another(tmp_path: Path) -> None:
    asked = replace(
        ASKED,
        arms=("DBB",),
        rates=(0.1,),
        settings={"short": {}, "long": {"epochs": 40}},
        base_setting="short",
    )
    made = Records(tmp_path / "lines.jsonl")
    while runs := needed(asked, made):
        for run in runs:
            accuracy = 90 + 0.1 * run.seed + 2 * (run.epochs == 40) - 9 * (run.rate != 0.1)
            made.add(run, {"accuracy": accuracy, "loss": 0.5, "similarity": 0.25})
    short, long = rows(lines(asked, made))
    assert short[6] == "base"
    assert long[6] == "+2.00"
    assert long[10] == "0.250"


def test_the_command_makes_what_is_missing_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"": {"epochs": 1, "train": 100}}
    asked = replace(ASKED, rates=(0.1,), is_tuned=False, settings=short, is_over_budgets=True)
    for name in ("QUESTIONS", "FASHION_QUESTIONS"):
        monkeypatch.setattr(command, name, {"asked": asked})
    monkeypatch.setattr(command, "SMALL_QUESTIONS", {})
    page, kept = tmp_path / "evidence.md", tmp_path / "lines.jsonl"
    page.write_text(f"before\n{MARKS}after\n")
    places = ["--records", str(kept), "--docs", str(page)]
    first = CliRunner().invoke(command.app, [*places, "--jobs", "1", "--most", "5"])
    assert first.exit_code == 0, first.output
    assert len(kept.read_text().splitlines()) == 5
    done = CliRunner().invoke(command.app, [*places, "--jobs", "1"])
    assert done.exit_code == 0, done.output
    assert len(kept.read_text().splitlines()) == 20
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| ResNet-8 | DBB | 0.1 |" in text
    assert "| ResNet-8 | 1 | " in text
    figure = tmp_path / "evidence" / "asked.svg"
    drawn = figure.read_bytes()
    again = CliRunner().invoke(command.app, [*places, "--summary"])
    assert again.exit_code == 0, again.output
    assert page.read_text() == text
    assert figure.read_bytes() == drawn


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with 60 images to train and 20 to test, in the format and the names of the real."""
    random = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 20)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        classes = (np.arange(count) % 10).astype(np.uint8)
        for what, head, values in (("images-idx3", 16, images), ("labels-idx1", 8, classes)):
            packed = gzip.compress(bytes(head) + values.tobytes())
            (tmp_path / f"{name}-{what}-ubyte.gz").write_bytes(packed)
    monkeypatch.setenv(FASHION_FOLDER, str(tmp_path))
    monkeypatch.setitem(GIVEN_TEST, "fashion", 20)
    load.cache_clear()
    yield tmp_path
    load.cache_clear()


def test_fashion_is_averaged_to_half_its_size_and_keeps_the_test_that_it_names(
    fashion: Path,
) -> None:
    parts = split("fashion", train=60, seed=0, held="test")
    packed = gzip.decompress((fashion / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    given = torch.tensor(list(packed)).reshape(20, 1, 28, 28).float()
    small = nn.functional.avg_pool2d(given, 2)
    own = parts.test[0]
    torch.testing.assert_close((own - own.mean()) / own.std(), (small - small.mean()) / small.std())
    assert parts.test[1].tolist() == [n % 10 for n in range(20)]
    assert [len(part[0]) for part in (parts.train, parts.validation)] == [60, 0]
    tuned = split("fashion", train=50, seed=0)
    assert [len(part[0]) for part in (tuned.train, tuned.validation)] == [50, 10]
    with pytest.raises(ValueError, match="fashion: 60 images to train of 60; none would validate"):
        split("fashion", train=60, seed=0)


def test_a_run_on_fashion_mirrors_its_images(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(RUN, data="fashion", train=50, batch=10, width=4)
    mirrored = train(run)
    assert mirrored["fit_seconds"] > 0
    monkeypatch.setattr(training, "FLIPPED", frozenset())
    assert train(run)["loss"] != mirrored["loss"]
    images = torch.randn(40, 1, 4, 4)
    turned = flipped(images, torch.Generator().manual_seed(0))
    own, mirror = ((turned == other).all((1, 2, 3)).sum() for other in (images, images.flip(-1)))
    assert own + mirror == 40
    assert min(own, mirror) > 10


def test_without_the_files_of_fashion_it_is_said_how_to_get_them(fashion: Path) -> None:
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        split("fashion", train=50, seed=0)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_preconditioned_step_is_that_of_the_block_to_first_order(kernel: int) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, kernel, bias=False), nn.BatchNorm2d(3), nn.ReLU())
    net, rate = nn.Sequential(*layers).double(), 1e-6
    images, start = torch.randn(4, 2, 5, 5).double(), layers[0].weight.detach().clone()
    block = orepa.OREPA if kernel > 1 else orepa.OREPA_1X1
    torch.manual_seed(1)  # the same branches are drawn
    expanded, plain = orepa.expand(net, block=block), copy.deepcopy(net)
    torch.manual_seed(1)
    moved = []
    for made in (expanded, preconditioned(net, images), plain):
        made(images)[:, :, 1:].square().sum().backward()
        with torch.no_grad():
            for parameter in made[0].parameters():
                parameter -= rate * parameter.grad
        moved.append((made[0].weight.detach() - start) / rate)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-3)
    assert (moved[1] - moved[2]).norm() > 1e-3 * moved[2].norm()


def test_the_diagonal_is_that_of_the_whole_product() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU())
    second, image = copy.deepcopy(first), torch.randn(1, 2, 5, 5)
    torch.manual_seed(1)
    preconditioned(first, image)
    torch.manual_seed(1)
    diagonally_preconditioned(second, image)
    for place in range(first[0].weight.numel()):
        found = []
        for net in (first, second):
            net.zero_grad()
            net[0].weight.flatten()[place].backward()
            found.append(net[0].weight.grad.flatten())
        assert found[0][place] == pytest.approx(found[1][place].item(), rel=1e-4)
        assert found[1].count_nonzero() == 1


def test_a_gain_at_equal_time_is_read_between_two_budgets_seed_by_seed() -> None:
    base = Form({n: {seed: 80 + log2(n) + seed for seed in range(4)} for n in (1, 2, 4)}, 10.0)
    own = Form({2: {seed: 83.0 + 1.5 * seed for seed in range(3)}}, 20.0)
    equal = at_equal_time(own, base, 2, 1.0)
    dearer = at_equal_time(own, base, 2, 2**0.25)
    assert equal is not None
    assert dearer is not None
    assert (equal.mean, equal.n) == (pytest.approx(2.5), 3)
    assert dearer.mean == pytest.approx(2.25)
    assert at_equal_time(own, base, 2, 2.1) is None
    assert epochs_for(base, 82.5) == pytest.approx(2.0)
    assert epochs_for(base, 81.75) == pytest.approx(2**0.25)
    assert epochs_for(base, 84.0) is None


def test_an_unknown_question_is_an_error() -> None:
    done = CliRunner().invoke(command.app, ["--question", "why"])
    assert done.exit_code == 2
    assert "no question 'why'" in done.output


def test_only_some_nets_of_a_question_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(ASKED, nets=("ResNet-8", "VGG-7"), settings={"": {"epochs": 1, "train": 100}})
    monkeypatch.setattr(command, "QUESTIONS", {"asked": asked})
    kept = tmp_path / "lines.jsonl"
    places = ["--records", str(kept), "--docs", str(tmp_path / "evidence.md"), "--jobs", "1"]
    done = CliRunner().invoke(command.app, [*places, "--net", "VGG-*", "--most", "2"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["run"]["net"] for line in kept.read_text().splitlines()] == [
        "VGG-7",
        "VGG-7",
    ]
    done = CliRunner().invoke(command.app, [*places, "--net", "ResNet-9"])
    assert done.exit_code == 2
    assert "nothing is asked there of data '*', net 'ResNet-9' and setting '*'" in " ".join(
        done.output.replace("│", " ").split()
    )


def test_only_some_settings_images_and_pairs_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"train": 50}
    settings = {"1 epoch": {**short, "epochs": 1}, "2 epochs": {**short, "epochs": 2}}
    asked = replace(ASKED, arms=("plain",), rates=(0.1,), is_tuned=False, settings=settings)
    both = {"small": asked, "large": replace(asked, data="mnist")}
    monkeypatch.setattr(command, "QUESTIONS", both)
    kept = tmp_path / "lines.jsonl"
    places = ["--records", str(kept), "--docs", str(tmp_path / "evidence.md"), "--jobs", "1"]
    asks = ["--data", "digits", "--setting", "1 *", "--seeds", "2"]
    done = CliRunner().invoke(command.app, [*places, *asks])
    assert done.exit_code == 0, done.output
    found = [json.loads(line)["run"] for line in kept.read_text().splitlines()]
    assert [(run["data"], run["epochs"], run["seed"]) for run in found] == [
        ("digits", 1, 0),
        ("digits", 1, 1),
    ]


def test_every_question_names_arms_and_nets_that_there_are() -> None:
    for asked in QUESTIONS.values():
        assert set(asked.arms) | {asked.base} <= ARMS.keys()
        assert set(asked.nets) <= NETS.keys()
        assert asked.base in asked.arms or asked.base_setting in asked.settings


def test_branches_without_scaling_are_a_learning_rate_and_with_it_they_are_not() -> None:
    assert largest_departure(scales=False) < 1e-13
    assert largest_departure(scales=True) > 1e-3
