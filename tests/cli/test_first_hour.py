"""A newcomer's first hour: what users have in their hands, and the mistakes that one makes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.cli import export_main, main
from orepa_compiler.model_source import load_model
from tests.norms import randomise_norms

NETS = """
import warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def half():
    return tiny().half()

def unbuilt():
    with torch.device("meta"):
        return tiny()

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 1), nn.Embedding(5, 4)
    def forward(self, image, ids, *, scale=1.0):
        return self.conv(image) + scale * self.table(ids).mean(1)[:, :, None, None]

class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
    def forward(self, batch):
        return {"map": self.conv(batch["image"])}

def labelled():
    data = TensorDataset(torch.randn(6, 3, 16, 16), torch.randint(5, (6,)))
    return DataLoader(data, batch_size=3)

def by_name():
    return {"image": torch.randn(2, 3, 8, 8), "ids": torch.randint(5, (2, 7)), "labels": 1}

def top1(model):
    torch.manual_seed(1)
    images, labels = torch.randn(20, 3, 16, 16), torch.randint(5, (20,))
    return {"top-1": (model(images).argmax(1) == labels).float().mean()}

def words(model):
    return "good"

def fails(model):
    raise ZeroDivisionError("no images")

def scripted():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(tiny())

class Says(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)
    def forward(self, image):
        return "cat"

class Sound(nn.Conv1d):
    def __init__(self):
        super().__init__(3, 4, 1)

def flattened():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))

def ids():
    return nn.Embedding(5, 4)

def ends():
    raise SystemExit("done")

def no_samples():
    return torch.zeros(0, 3, 16, 16)

def labels():
    return [{"labels": torch.zeros(2)}]

class Timed(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)
    def forward(self, image, time):
        return super().forward(image) * time[:, None, None, None]

class Named(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)
    def forward(self, image):
        return {"logits": super().forward(image), "maps": [image, None]}

def at_times():
    return {"image": torch.randn(2, 3, 8, 8), "time": torch.rand(2)}

def spoilt():
    return torch.full((2, 3, 16, 16), float("nan"))
"""


# A training script that reads its own command line where it is imported.
SCRIPT = """
import argparse
import nets
parser = argparse.ArgumentParser()
parser.add_argument("--rate", default=0.1)
options = parser.parse_args()
build = nets.tiny
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py, images and arrays, right and wrong ones."""
    folder = tmp_path_factory.mktemp("hour")
    (folder / "nets.py").write_text(NETS)
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for name in ("cats/a.jpg", "cats/b.png", "dogs/c.jpg", "broken/d.jpg", "stray/e.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken/d.jpg").write_bytes(b"no image")
    (folder / "stray/notes.txt").write_text("mine")
    (folder / "empty").mkdir()
    values = random.normal(size=(3, 3, 16, 16)).astype(np.float32)
    np.save(folder / "good.npy", values)
    values[1, 0, 0, 0] = np.nan
    np.save(folder / "nan.npy", values)
    np.save(folder / "numbers.npy", np.float32([1, 2]))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "none.npy", np.zeros((0, 3, 16, 16), np.float32))
    (folder / "script.py").write_text(SCRIPT)
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("hello")
    (folder / "bad.onnx").write_text("x")
    (folder / "bad.onnx.manifest.json").write_text("{")
    weights = load_model(f"{folder}/nets.py:tiny").state_dict()
    torch.save(weights, folder / "tiny.pth")
    torch.save({key: value.int() for key, value in weights.items()}, folder / "whole.pth")
    torch.save([*weights.values()], folder / "list.pth")
    return folder


@pytest.fixture(autouse=True)
def here(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared)
    return shared


def run(command: Callable[..., int], line: str, capsys: pytest.CaptureFixture[str]) -> tuple:
    code = command(line.split())
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


TINY = "nets.py:tiny --onnx out.onnx"
WRONG: list[tuple[str, str, str]] = [
    # the command itself
    ("orepa", "exprot nets.py:tiny", "No such command 'exprot'"),
    ("orepa", "plan", "Missing argument 'MODEL'; see orepa plan --help"),
    ("orepa", "export nets.py:tiny --onx a.onnx", "No such option: --onx"),
    ("orepa", "verify a b --batch 0", "see orepa verify --help"),
    ("orepa", "plan resnet18", "this names no model; write it as torchvision:NAME"),
    ("orepa", "plan torchvision:resnet19", "did you mean"),
    ("orepa", "plan nets.py:tini", "defines no tini; did you mean tiny"),
    ("orepa", "plan gone.py:tiny", "there is no file gone.py"),
    ("orepa", "plan nets.py:tiny --block OREPA2", "--block OREPA2: choose one of auto, OREPA"),
    ("orepa", "plan nets.py:tiny --summary --json", "--summary: --json prints the whole plan"),
    ("orepa", "plan nets.py:tiny --num-classes 3", "--num-classes goes with a name of torchvis"),
    ("orepa", "plan nets.py:tiny --checkpoint gone.pth", "gone.pth: there is no such file"),
    ("orepa", "plan nets.py:tiny --weights ema", "--weights: there is no --checkpoint"),
    ("orepa", "plan nets.py:tiny --where [", "--where [: matches none of the"),
    ("orepa", "plan nets.py:tiny --where 0 --where 0.gone", "--where 0.gone: matches none of the"),
    ("orepa", "plan nets.py:tiny --where !gone", "--where !gone: matches none of the"),
    ("orepa", "plan nets.py:tiny --input-shape 16", "give the right --input-shape"),
    ("orepa", "bench a.onnx", "give --against STOCK.onnx"),
    ("orepa", "bench a.onnx --against b.onnx", "a.onnx: there is no such file"),
    ("orepa", "verify nets.py:tiny nets.py:tiny --input-shape 3by4", "write it as sizes with x"),
    # an export, before anything runs
    ("export", "nets.py:tiny", "nothing to write: give --onnx"),
    ("export", f"{TINY} --json out.onnx", "--json out.onnx: --onnx writes that file"),
    ("export", f"{TINY} --junit empty", "empty: this is a folder; name a file in it"),
    ("export", f"{TINY} --tf32", "--tf32: without --trt no engine is built; leave it out"),
    ("export", f"{TINY} --workspace-gb 2", "--workspace-gb: without --trt"),
    ("export", f"{TINY} --trt-flavor rtx", "--trt-flavor: without --trt"),
    ("export", f"{TINY} --compute-capability 8.9", "--compute-capability: without --trt"),
    ("export", f"{TINY} --timing-cache t.bin", "--timing-cache: without --trt"),
    ("export", f"{TINY} --trt a.engine --compute-capability ada", "write it as 8.9"),
    ("export", f"{TINY} --trt a.engine --workspace-gb -1", "give a positive number of GiB"),
    ("export", f"{TINY} --opset 9", "--opset 9: fp32 needs 18 or newer"),
    ("export", f"{TINY} --opset 20 --precision bf16", "--opset 20: bf16 needs 22 or newer"),
    ("export", f"{TINY} --keep-fp32 0", "--keep-fp32: all of it is float32; leave it out"),
    ("export", f"{TINY} --calibration cats", "--calibration: fp32 needs no ranges"),
    ("export", f"{TINY} --precision int8", "--precision int8 takes the ranges of the values"),
    ("export", f"{TINY} --weights ema", "--weights: there is no --checkpoint; leave it out"),
    ("export", f"{TINY} --weights best --checkpoint x", "Invalid value for '--weights'"),
    ("export", f"{TINY} --expanded OREPA", "--expanded: there is no --checkpoint"),
    ("export", f"{TINY} --allow-pickle", "--allow-pickle: there is no --checkpoint"),
    ("export", f"{TINY} --pretrained", "--pretrained goes with a name of torchvision or timm"),
    ("export", f"{TINY} --num-classes 3", "--num-classes goes with a name of torchvision or"),
    ("export", f"{TINY} --num-classes 0", "Invalid value for '--num-classes'"),
    ("export", f"{TINY} --input-shape 3x16xN", "--input-shape 3x16xN: write it as sizes"),
    ("export", f"{TINY} --input-shape 3x16:float", "after the colon, write int64, int32"),
    ("export", f"{TINY} --input-names a,,b", "--input-names a,,b: '' is no name; write one word"),
    ("export", f"{TINY} --input-names a,a", "'a' stands there twice; give each a name of its own"),
    ("export", f"{TINY} --input-names a --output-names a", "'a' names an input and an output"),
    (
        "export",
        f"{TINY} --input-shape 3x8x8 --input-names a,b",
        "--input-names a,b: names 2 inputs, and --input-shape is given for 1; give one name for",
    ),
    (
        "export",
        f"{TINY} --dynamic-size --trt a.engine",
        "built for a range of sizes; give --min-sh",
    ),
    (
        "export",
        f"{TINY} --dynamic-size --trt a.engine --input-shape 3x8x8 --min-shapes 1x3x16x16 "
        "--opt-shapes 1x3x16x16 --max-shapes 1x3x32x32",
        "--input-shape 3x8x8: the engine is run at this shape, and takes --min-shapes 1x3x16x16 to",
    ),
    ("export", f"{TINY} --crop 16", "there are no images; leave it out"),
    ("export", f"{TINY} --inputs cats --mean 0.5;0.5", "--mean 0.5;0.5: write it as numbers"),
    ("export", f"{TINY} --inputs cats --std 0,1,1", "--std 0,1,1: every number has to be pos"),
    ("export", f"{TINY} --inputs cats --mean 0.5", "the images have 3 channels, but these 1"),
    ("export", f"{TINY} --inputs gone", "--inputs gone: there is no such file or folder"),
    ("export", f"{TINY} --inputs gone.py:f", "--inputs gone.py:f: there is no file gone.py"),
    ("export", f"{TINY} --evaluate gone.py:f", "gone.py:f: there is no file gone.py"),
    ("export", f"{TINY} --evaluate nets", "nets: this names no function; write it as"),
    # files that are read, and would be written over
    ("export", "nets.py:tiny --onnx nets.py", "--onnx nets.py: the command reads that file; name"),
    ("export", "nets.py:tiny --checkpoint tiny.pth --onnx tiny.pth", "the command reads that file"),
    ("export", f"{TINY} --inputs good.npy --json good.npy", "the command reads that file"),
    ("orepa", "verify nets.py:tiny bad.onnx --json bad.onnx", "the command reads that file"),
    ("export", "nets.py:tiny --onnx out", "--onnx out: its name ends in .onnx; name it so"),
    ("export", f"{TINY} --trt out.rt", "--trt out.rt: its name ends in .engine or .plan or .trt"),
    # what is no model, and no weights
    ("export", "tiny.pth --onnx out.onnx", "weights alone are no model; name the model (torchv"),
    ("orepa", "verify nets.py:tiny tiny.pth", "and give the file with --checkpoint"),
    ("export", "nets.py:scripted --onnx out.onnx", "gave TorchScript; give the nn.Module that it"),
    ("export", "nets.py:ends --onnx out.onnx", "calling ends() raised SystemExit('done'): it ends"),
    ("export", f"{TINY} --checkpoint empty.pth", "empty.pth: the file is empty; save or copy it"),
    ("export", f"{TINY} --checkpoint text.pth", "neither safetensors nor a torch.save file"),
    ("export", f"{TINY} --checkpoint list.pth", "holds a list, not a state_dict; save model."),
    ("export", f"{TINY} --checkpoint cats", "cats: this is a folder; name the file in it"),
    ("export", f"{TINY} --checkpoint whole.pth", "8 whole numbers (0.weight, 0.bias, 1.weight, "),
    ("orepa", "verify bad.onnx bad.onnx", "bad.onnx: not a whole ONNX file (1 bytes;"),
    ("orepa", "verify bad.onnx.manifest.json", "bad.onnx.manifest.json: is not whole JSON"),
    # an export, once the model is there
    ("export", "nets.py:Says --onnx out.onnx", "its forward returns a str; it must return tensors"),
    ("export", "nets.py:ids --onnx out.onnx", "give whole numbers as --input-shape 16:int64"),
    ("export", f"{TINY} --inputs numbers.npy", "give the right --input-shape, once for each"),
    ("export", f"{TINY} --inputs words.npy", "--inputs words.npy: cannot be read (can't convert"),
    ("export", f"{TINY} --inputs none.npy", "holds (0, 3, 16, 16); the first axis counts the sa"),
    (
        "export",
        f"{TINY} --inputs nets.py:no_samples",
        "a tensor of shape (0, 3, 16, 16), which has",
    ),
    ("export", f"{TINY} --inputs nets.py:labels", "does not run on inputs of shape (2,)"),
    ("export", f"{TINY} --input-names a,b", "names 2 inputs, and the model takes 1; give one name"),
    (
        "export",
        f"{TINY} --output-names a,b",
        "names 2 outputs, and the model returns 1 (output)",
    ),
    (
        "export",
        f"{TINY} --input-names output",
        "output: 'output' is the name of an output",
    ),
    (
        "export",
        "nets.py:Named --onnx out.onnx --input-shape 3x8x8 --output-names a",
        "--output-names a: the model returns its outputs by name (logits, maps.0)",
    ),
    (
        "export",
        "nets.py:Sound --onnx out.onnx --input-shape 3x8 --dynamic-size",
        "--dynamic-size: no input has a height and a width (their shapes are [(2, 3, 8)]); leave",
    ),
    (
        "export",
        "nets.py:flattened --onnx out.onnx --input-shape 3x8x8 --dynamic-size",
        "--dynamic-size: the model takes no height and width but (8, 8): at (40, 72) it raises",
    ),
    ("export", f"{TINY} --inputs nan.npy", "1 of 3 samples hold NaN or infinity, the first is"),
    ("export", f"{TINY} --inputs nets.py:spoilt", "batch 0: 2 of 2 samples hold NaN or infinity"),
    ("export", f"{TINY} --inputs empty", "holds no .npy or .npz files and no images"),
    ("export", f"{TINY} --inputs broken", "broken/d.jpg: not an image that can be read"),
    ("export", f"{TINY} --inputs nets.py", "give a .npy or .npz file, a folder of them or of im"),
    ("export", f"{TINY} --inputs nets.py:tiny", "batch 0 holds Conv2d; give a tensor, a tuple"),
    ("export", f"{TINY} --input-shape 4x16x16", "give the right --input-shape, once for each"),
    ("export", f"{TINY} --input-shape 3x16x16:int64", "its weights are float32 and the inputs in"),
    ("export", f"{TINY} --precision fp16 --keep-fp32 head", "'head' matches none of the"),
    (
        "export",
        "nets.py:Words --onnx out.onnx",
        "its forward takes (image, ids, scale=...): give --input-shape once for each",
    ),
    ("export", "nets.py:unbuilt --onnx out.onnx", "0.weight is on the meta device, without values"),
]


@pytest.mark.parametrize(("program", "line", "said"), WRONG, ids=[line for _, line, _ in WRONG])
def test_a_mistake_is_one_line_with_exit_code_2(
    program: str, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in Path.cwd().iterdir()} - {"__pycache__"}
    code, out, err = run(main if program == "orepa" else export_main, line, capsys)
    assert (code, out, len(err)) == (2, "", 1), err
    assert said in err[0]
    assert {path.name for path in Path.cwd().iterdir()} - {"__pycache__"} == before


# Run in one process of its own, for the imports of this one are all made.
WITHOUT_TORCH = """
import contextlib, io, sys
from orepa_compiler.cli import export_main, main
lines = ["--help", "--version", "plan -h", "export -h", "verify -h", "bench -h", "exprot",
         "export nets.py:tiny --onnx no/a.onnx", "export nets.py:tiny --onnx a.onnx --tf32"]
codes = [main(line.split()) for line in lines]
codes.append(export_main(["--version"]))
assert codes == [0] * 6 + [2] * 3 + [0], codes
late = {"torch", "onnx", "onnxruntime", "numpy", "jinja2", "matplotlib"} & set(sys.modules)
assert not late, late
"""


def test_help_and_the_mistakes_of_a_command_line_import_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(orepa.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("orepa-compiler 0.") == 2


def test_python_m_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orepa_compiler", "--version"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(orepa.__file__).parents[1]), "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stdout) == (0, f"orepa-compiler {orepa.__version__}\n")


EXPORT = "--input-shape 3x16x16 --onnx out.onnx"


@pytest.fixture
def exported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[str, list[str]]]:
    """An export that passes, from a folder of its own: its table, and the lines of stderr."""
    for name in ("nets.py", "cats", "dogs", "stray", "good.npy"):
        (tmp_path / name).symlink_to(Path.cwd() / name)
    monkeypatch.chdir(tmp_path)

    def export(line: str) -> tuple[str, list[str]]:
        code, out, err = run(export_main, line, capsys)
        assert code == 0, err
        assert Path("out.onnx").is_file()
        return out, err

    return export


Exported = Callable[[str], tuple[str, list[str]]]


def test_a_trainers_checkpoint_is_read_and_said(exported: Exported) -> None:
    model = randomise_norms(load_model("nets.py:tiny"))
    average = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average}, "equal.pth")
    out, err = exported(f"nets.py:tiny --checkpoint equal.pth {EXPORT}")
    assert "9 tensors from state_dict" in out
    out, _ = exported(f"nets.py:tiny --checkpoint equal.pth --weights ema {EXPORT}")
    assert "9 tensors from state_dict_ema" in out
    assert "prefix 'module.' dropped" in " ".join(out.split())
    assert err == []


def test_a_script_that_reads_its_command_line_and_one_number_for_each_sample(
    exported: Exported, shared: Path
) -> None:
    Path("script.py").symlink_to(shared / "script.py")
    exported("script.py:build --input-shape 3x8x8 --onnx out.onnx")
    exported("nets.py:Timed --inputs nets.py:at_times --onnx out.onnx --input-names picture,t")


def test_the_state_dict_of_an_expanded_model_is_enough(exported: Exported) -> None:
    model = orepa.expand(load_model("nets.py:tiny"), block="orepa")
    torch.save(model.state_dict(), "expanded.pth")
    out, _ = exported(f"nets.py:tiny --checkpoint expanded.pth {EXPORT}")
    assert "training form, OREPA blocks" in out
    assert "certify collapse" in out


def test_images_and_a_data_loader_with_labels_are_inputs(exported: Exported) -> None:
    assert exported(f"nets.py:tiny --inputs cats --crop 16 --resize 20 {EXPORT}")[1] == []
    _, err = exported(f"nets.py:tiny --inputs stray --onnx out.onnx --crop 16 {EXPORT}")
    assert err == ["--inputs stray: 1 other file is ignored (notes.txt)"]
    exported(f"nets.py:tiny --inputs nets.py:labelled {EXPORT}")
    exported(f"nets.py:tiny --precision int8 --calibration nets.py:labelled {EXPORT}")


def test_calibration_images_give_the_inputs_their_size(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "nets.py:tiny --onnx out.onnx --precision int8 --calibration"
    exported(f"{line} cats --crop 16")
    (value,) = orepa.OnnxRunner("out.onnx").inputs
    assert tuple(value.shape)[1:] == (3, 16, 16)
    code, _, err = run(export_main, f"{line} good.npy", capsys)
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith("of any first axis; give the shape of your data as --input-shape")


def test_half_models_and_keyword_dict_and_whole_number_inputs(exported: Exported) -> None:
    assert "float16 weights read as float32" in exported(f"nets.py:half {EXPORT}")[0]
    exported("nets.py:Words --inputs nets.py:by_name --onnx out.onnx")
    exported("nets.py:Words --input-shape 3x8x8 --input-shape 7:int64 --onnx out.onnx")
    exported("nets.py:Boxed --inputs nets.py:by_name --onnx out.onnx")


def test_accuracy_is_told_of_every_form(exported: Exported) -> None:
    model = randomise_norms(orepa.expand(load_model("nets.py:tiny"), block="OREPA"))
    orepa.save(model, "expanded.safetensors")
    line = f"nets.py:tiny --checkpoint expanded.safetensors --evaluate nets.py:top1 {EXPORT}"
    out, _ = exported(f"{line} --json out.json --report out.html")
    steps = json.loads(Path("out.json").read_text())["steps"]
    scores = {step["step"]: step["scores"] for step in steps if "scores" in step}
    forms = ["expanded model", "stock model", "collapsed model", "ONNX file"]
    assert list(scores) == [f"evaluate {form}" for form in forms]
    assert len({tuple(found.items()) for found in scores.values()}) == 1
    (share, *_) = scores["evaluate ONNX file"].values()
    assert 0 <= share <= 1
    assert "evaluate stock model" in out
    assert f"top-1 {share:.6g}" in Path("out.html").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("words", "nets.py:words: gave str; return a number, or a dict of numbers"),
        ("fails", "nets.py:fails: raised ZeroDivisionError on the model: no images"),
    ],
)
def test_a_function_that_tells_nothing_is_no_pass(
    name: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = f"nets.py:tiny --evaluate nets.py:{name} --input-shape 3x16x16 --onnx {tmp_path}/o.onnx"
    code, _, err = run(export_main, line, capsys)
    assert code == 4
    assert said in err[0]


def test_random_weights_are_said_at_once_and_pass(exported: Exported) -> None:
    out, err = exported("timm:test_resnet --num-classes 7 --onnx out.onnx --quiet")
    warning = "timm:test_resnet: warning: random weights: give --checkpoint FILE or --pretrained"
    assert (out, err) == ("", [warning])
    (shape,) = {tuple(o.shape) for o in orepa.OnnxRunner("out.onnx").inputs}
    assert shape[1:] == (3, 160, 160), "the size that timm's configuration says"
    (output,) = orepa.OnnxRunner("out.onnx").outputs
    assert output.shape[1] == 7


def test_a_projects_options_come_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").symlink_to(Path.cwd() / "nets.py")
    monkeypatch.chdir(tmp_path)
    file = Path("pyproject.toml")
    file.write_text(
        '[tool.orepa]\ninput-shape = ["3x16x16"]\n[tool.orepa.plan]\nblock = "DBB"\njson = true\n'
    )
    code, out, _ = run(main, "plan nets.py:tiny", capsys)
    assert code == 0
    (edit,) = [e for e in json.loads(out)["edits"] if e["done_by"] == "expand"]
    assert edit["after"].startswith("DBB")
    assert edit["macs"], "the shape came from the file too"
    file.write_text("[tool.orepa]\nblok = 1\n")
    code, _, err = run(main, "plan nets.py:tiny", capsys)
    assert (code, len(err)) == (2, 1)
    assert "[tool.orepa]: no command has an option --blok" in err[0]
    file.write_text("[tool.orepa.pln]\nblock = 1\n")
    assert "[tool.orepa.pln]: there is no such command" in run(main, "plan x", capsys)[2][0]
    file.write_text("[tool.orepa\n")
    assert "cannot be read as TOML" in run(main, "plan nets.py:tiny", capsys)[2][0]


def test_a_plan_fits_80_columns_and_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ("", "--summary"):
        line = f"plan timm:test_efficientnet --input-shape 3x160x160 {options}"
        code, out, err = run(main, line, capsys)
        assert (code, err) == (0, [])
        assert max(map(len, out.splitlines())) <= 80
        assert "blocks.3.0.se.conv_reduce" in out, "paths are not broken"
    assert len(out.splitlines()) < 24


def test_ctrl_c_says_what_is_there(
    monkeypatch: pytest.MonkeyPatch, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orepa_compiler.cli.run.stages.OnnxRunner", interrupt)
    code, _, err = run(export_main, f"nets.py:tiny {EXPORT}", capsys)
    assert code == 130
    assert err == [
        "orepa-export: stopped by Ctrl-C in the step 'check onnx'; out.onnx is written and whole, "
        "and there is no manifest"
    ]


def test_blocks_have_one_name_everywhere() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert orepa.plan(net, block="dbb") == orepa.plan(net, block=orepa.DBB)
    assert orepa.plan(net, block="MOBILEONE") == orepa.plan(net, block=orepa.MOBILEONE)
    with pytest.raises(orepa.ReparamError, match="block='OREPO': choose one of auto, OREPA"):
        orepa.plan(net, block="OREPO")
