"""The recipe for ImageNet, on synthetic images: the paper's networks, and a run that is killed."""

from __future__ import annotations

import csv
import importlib
import io
import os
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "imagenet"
SMALL = ["--size", "32", "--batch", "8", "--warmup", "1", "--workers", "0"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"PYTHONDONTWRITEBYTECODE": "1"}
# In seconds: for a machine with much else to do.
PATIENCE = 300
FILES = {"deploy.safetensors", "last.pt", "log.csv", "model.onnx", "trained.safetensors"}

# Millions of parameters in the authors' code.
REFERENCE = {
    ("ResNet-18", "plain"): 11.69,
    ("ResNet-18", "dbb"): 26.29,
    ("ResNet-18", "orepa"): 37.76,
    ("ResNet-50", "dbb"): 40.68,
    ("ResNet-50", "orepa"): 68.58,
    ("ResNeXt-50", "dbb"): 26.99,
    ("ResNeXt-50", "orepa"): 63.71,
    ("RepVGG-A0", "orepa"): 24.75,
    ("ResNet-18-2x", "orepa"): 149.41,
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the recipe, as it is found when train.py runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.parametrize(("arch", "form"), REFERENCE)
def test_networks_are_those_of_the_authors(recipe: Any, arch: str, form: str) -> None:
    with torch.device("meta"):
        model = recipe("networks").network(arch, form)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == REFERENCE[arch, form]


def test_repvgg_has_no_diverse_branches(recipe: Any) -> None:
    with pytest.raises(Exception, match="RepVGG-A0 has branches of its own: form plain or orepa"):
        recipe("networks").network("RepVGG-A0", "dbb")


def test_the_schedule_is_a_linear_warm_up_and_a_cosine(recipe: Any) -> None:
    settings = recipe("settings").parse(["--synthetic", "8"])
    rates = [settings.rate(step, 10) for step in range(1200)]
    assert rates[:2] == pytest.approx([1 / 50, 2 / 50])
    assert rates[49:51] == pytest.approx([1.0, 1.0])
    assert rates[50 + 575] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-5
    assert all(a > b for a, b in pairwise(rates[50:]))


def test_every_process_takes_its_own_share(recipe: Any) -> None:
    images: ModuleType = recipe("images")
    samplers = [images.EpochSampler(23, 3, rank=rank, world=2, seed=0) for rank in range(2)]
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [3, 3]
    seen = [index for share in shares for batch in share for index in batch]
    assert len(set(seen)) == 18
    samplers[0].epoch = 1
    assert list(samplers[0]) != shares[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give either --data or --synthetic"),
        (["--synthetic", "8", "--data", "x"], "give either --data or --synthetic"),
        (["--synthetic", "8", "--two-phase", "--form", "dbb"], "it needs --form orepa"),
        (["--synthetic", "8", "--arch", "VGG"], "choose from ResNet-18, ResNet-34"),
    ],
)
def test_arguments(
    recipe: Any, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe("settings").parse(arguments)
    assert expected in capsys.readouterr().err.replace("'", "")


def folder_of_images(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (48, 40, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{index}.png")
    return folder


def test_a_folder_of_images(recipe: Any, tmp_path: Path) -> None:
    data, output = folder_of_images(tmp_path / "images"), tmp_path / "run"
    arguments = [*SMALL, "--data", str(data), "--output", str(output), "--epochs", "1"]
    arguments += ["--two-phase", "--amp", "bf16", "--accumulate", "2", "--groups", "all"]
    train = recipe("train")
    train.main(arguments)
    assert {path.name for path in output.iterdir()} == FILES
    with pytest.raises(SystemExit, match=r"was written with lr 0\.1 and not 0\.2; give another"):
        train.main([*arguments, "--lr", "0.2"])
    with pytest.raises(SystemExit, match="--batch 8 does not divide into 1 processes of 3"):
        train.main([*arguments, "--accumulate", "3"])


def shards_of(images: Path, folder: Path) -> Path:
    """The images of a folder as two shards for each part: KEY.png, then KEY.cls, and so on."""
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        for label, name in enumerate(("cat", "dog")):
            with tarfile.open(folder / part / f"{label}.tar", "w") as archive:
                for image in sorted((images / part / name).iterdir()):
                    archive.add(image, f"some.{name}/{image.stem}.png")
                    text = tarfile.TarInfo(f"some.{name}/{image.stem}.cls")
                    text.size = 1
                    archive.addfile(text, io.BytesIO(str(label).encode()))
    return folder


def test_shards_are_the_images_of_the_folder(recipe: Any, tmp_path: Path) -> None:
    images: ModuleType = recipe("images")
    folder = folder_of_images(tmp_path / "images")
    unpacked = images.folder_images(folder, 32)
    packed = images.folder_images(shards_of(folder, tmp_path / "shards"), 32)
    assert type(packed.train).__name__ == "Shards"
    assert (packed.classes, len(packed.train), len(packed.val)) == (2, 8, 4)
    for index in range(4):
        (image, label), (same, same_label) = packed.val[index], unpacked.val[index]
        assert label == same_label
        assert torch.equal(image, same)
    assert [label for _, label in packed.train] == [0] * 4 + [1] * 4


def test_a_shard_must_be_whole(recipe: Any, tmp_path: Path) -> None:
    data = shards_of(folder_of_images(tmp_path / "images"), tmp_path / "shards")
    with tarfile.open(data / "train" / "2.tar", "w") as archive:
        archive.add(tmp_path / "images" / "val" / "cat" / "0.png", "alone.png")
    with pytest.raises(ValueError, match=r"2\.tar: alone has no image or no \.cls"):
        recipe("images").folder_images(data, 32)
    (data / "val" / "0.tar").unlink()
    (data / "val" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"val: no shard \(\*\.tar\) there"):
        recipe("shards").Shards(data / "val", lambda image: image)


def test_a_run_that_is_killed_ends_as_an_undisturbed_one(recipe: Any, tmp_path: Path) -> None:
    train, undisturbed, disturbed = recipe("train"), tmp_path / "one", tmp_path / "two"
    arguments = [*SMALL, "--form", "plain", "--synthetic", "16", "--epochs", "3", "--output"]
    kill_after_an_epoch([sys.executable, str(FOLDER / "train.py"), *arguments, str(disturbed)])
    assert {path.name for path in disturbed.iterdir()} == {"last.pt", "log.csv"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for output in (disturbed, undisturbed):
            train.main([*arguments, str(output)])
    finally:
        torch.set_num_threads(threads)
    assert rows(undisturbed) == rows(disturbed)
    found = [load_file(output / "trained.safetensors") for output in (undisturbed, disturbed)]
    assert list(found[0]) == list(found[1])
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def kill_after_an_epoch(command: list[str]) -> None:
    checkpoint = Path(command[-1]) / "last.pt"
    run = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while not checkpoint.exists():
            assert run.poll() is None, "the run ended before its first epoch did"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        run.kill()
        run.wait()


def test_two_processes_of_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "train.py"), *SMALL, "--form", "plain"]
    command += ["--synthetic", "8", "--epochs", "1", "--output", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, env=ENVIRONMENT, **pipes)  # type: ignore[call-overload]
    try:
        printed = run.communicate(timeout=PATIENCE)[0]
    finally:
        run.terminate()  # torchrun then ends its processes
        run.wait()
    assert run.returncode == 0, printed
    assert printed.count("epoch 1/1") == 1
    assert "s/epoch, 0:00:00 left" in printed
    assert "PASS" in printed
    assert {path.name for path in tmp_path.iterdir()} == FILES


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open() as file:
        found = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    assert len(found) == 3
    return found
