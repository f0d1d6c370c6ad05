"""load_model: what each form of a model's name gives, and the one line that each mistake gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from orepa_compiler.errors import MissingPackage, ReparamError
from orepa_compiler.model_source import load_model

NETS = """
from pathlib import Path
import functools
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def of_width(width, depth, *rest, groups=1, **others):
    return nn.Conv2d(3, width, depth)

def fails():
    raise ValueError("no\\nweights")

def nothing():
    pass

ready = tiny()
part = functools.partial(nn.Conv2d, 3, 4, 1)
WIDTH = 8
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nets.py in it, which is also the current one."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


def message(source: str) -> str:
    with pytest.raises(ReparamError) as caught:
        load_model(source)
    text = str(caught.value)
    assert text.startswith(f"{source}: ")
    assert "\n" not in text
    return text


def test_torchvision_and_timm_give_their_models() -> None:
    assert type(load_model("torchvision:resnet18")).__name__ == "ResNet"
    assert type(load_model("timm:test_resnet")).__name__ == "ResNet"
    assert type(load_model("timm:test_resnet.r160_in1k")).__name__ == "ResNet"


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_segmenters_and_detectors_download_no_backbone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: object, **options: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert isinstance(load_model(f"torchvision:{name}"), nn.Module)


def test_a_file_and_a_module_in_the_current_folder_give_what_their_factory_gives(
    folder: Path,
) -> None:
    for source in ("nets:tiny", "nets.py:tiny", f"{folder}/nets.py:tiny", "nets:ready"):
        assert isinstance(load_model(source), nn.Sequential)
    assert isinstance(load_model("nets.py:part"), nn.Conv2d)


def test_a_file_may_import_its_neighbours_and_leaves_the_import_path_alone(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "neighbour.py").write_text("from torch import nn\nnet = nn.ReLU")
    (folder / "sub" / "model.py").write_text("from neighbour import net")
    before = list(sys.path)
    assert isinstance(load_model("sub/model.py:net"), nn.ReLU)
    assert sys.path == before


def test_a_file_whose_module_is_looked_up_by_its_name_loads(folder: Path) -> None:
    (folder / "data.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\nclass Width:\n    value: int = 4\n"
        "def net():\n    return nn.Conv2d(3, Width().value, 1)\n"
    )
    assert isinstance(load_model("data.py:net"), nn.Conv2d)


@pytest.mark.parametrize("source", ["resnet50", "resnet50:", ":factory", ""])
def test_a_name_of_no_form_is_answered_with_the_forms(source: str) -> None:
    assert "write it as torchvision:NAME, timm:NAME, package.module:factory or" in message(source)


@pytest.mark.parametrize(
    ("source", "closest"),
    [("torchvision:resnet52", "resnet50"), ("timm:resnet_50", "resnet50")],
)
def test_an_unknown_model_is_answered_with_the_closest_names(source: str, closest: str) -> None:
    text = message(source)
    assert "no model of" in text
    assert "did you mean" in text
    assert closest in text.split("did you mean")[1]


def test_a_name_like_no_other_is_answered_without_a_guess() -> None:
    assert "did you mean" not in message("torchvision:qqqqqq")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_answered_with_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(MissingPackage, match=f"needs the package {package}; .*pip install"):
        load_model(f"{package}:resnet18")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone.py:tiny", "there is no file gone.py"),
        ("gone.nets:tiny", "there is no module gone here or among the installed packages"),
        ("nets:tinny", "nets defines no tinny; did you mean tiny?"),
        ("nets.py:WIDTH", "WIDTH is of type int, not a factory"),
        ("nets:of_width", "of_width needs the arguments width, depth; name a function"),
        ("nets:fails", "calling fails() raised ValueError: no weights"),
        ("nets:nothing", "nothing() gave a NoneType, not a torch.nn.Module"),
        ("broken:tiny", "importing it raised SyntaxError"),
        ("broken.py:tiny", "importing it raised SyntaxError"),
        ("needy:tiny", "importing it raised ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_each_mistake_is_answered_in_one_line(folder: Path, source: str, said: str) -> None:
    (folder / "broken.py").write_text("def tiny(:\n")
    (folder / "needy.py").write_text("import nowhere\n")
    assert said in message(source)


def test_torchvision_imports_beside_any_torch() -> None:
    code = (
        "from orepa_compiler.model_source import declare_torchvision_operators as declare\n"
        "declare(); declare()\n"
        "import torchvision"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
