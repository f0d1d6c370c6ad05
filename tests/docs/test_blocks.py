"""docs/blocks.md: every statement of Python in it runs, and each ablation is the one it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.catalogue import BLOCKS, DILATED_KERNELS

TEXT = (Path(__file__).parents[2] / "docs" / "blocks.md").read_text()
SETUP, *REST = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


class Small(nn.Module):
    """What a statement needs of ResNet-18: a large stem, 3 x 3 and 1 x 1 convs, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.conv, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point, self.norm3 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        return self.relu(self.norm3(self.point(x + self.relu(self.norm2(self.conv(x))))))


# What each statement after the setup makes of the net: path -> (scaling layer, branches).
SIX = "origin pointwise pointwise_kernel average frequency depthwise_pointwise"
DBB = "origin pointwise pointwise_kernel average"
EXPECTED = {
    "+ offline DBB": {"conv": ("norm", DBB)},
    "+ online": {"conv": ("vector", DBB)},
    "+ frequency filter": {"conv": ("vector", DBB + " frequency")},
    "+ linear depthwise separable": {"conv": ("vector", SIX)},
    "+ linear deep stem": {"conv": ("vector", SIX), "stem": ("vector", "origin deep_stem")},
    "+ Rep-1x1": {
        "conv": ("vector", SIX),
        "stem": ("vector", "origin deep_stem"),
        "point": ("vector", "origin pointwise_pointwise"),
    },
    "vector scaling": {"stem": ("vector", SIX), "conv": ("vector", SIX)},
    "scalar": {"stem": ("scalar", SIX), "conv": ("scalar", SIX)},
    "none": {"stem": ("none", SIX), "conv": ("none", SIX)},
    "without post-addition norm": {"stem": ("vector", SIX), "conv": ("vector", SIX)},
    "RepVGG-Online": {
        "stem": ("vector", "origin pointwise"),
        "conv": ("vector", "origin pointwise identity"),
    },
    "RepVGG": {
        "stem": ("norm", "origin pointwise"),
        "conv": ("norm", "origin pointwise identity"),
    },
    "OREPA-VGG": {
        "stem": ("norm", "origin pointwise"),
        "conv": ("norm", "origin pointwise identity"),
    },
    "OREPA-VGG-Offline": {"stem": ("norm", SIX), "conv": ("norm", SIX + " identity")},
    "DCT": {"stem": ("vector", SIX), "conv": ("vector", SIX)},
}


def statements() -> list[str]:
    """The statements after the setup, each with the comment behind it."""
    return [
        "\n".join(code.splitlines()[statement.lineno - 1 : statement.end_lineno])
        for code in REST
        for statement in ast.parse(code).body
    ]


def expansions() -> dict[str, str]:
    """The statements that expand, by what is said of them."""
    named = {}
    for statement in statements():
        if statement.startswith("orepa.expand"):
            said = statement.partition("  # ")[2] or re.findall(r'"(\w+)"', statement)[-1]
            named["DCT" if "DCTFilter" in statement else said] = statement
    return named


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    made: dict[str, object] = {}
    exec(SETUP.replace("torchvision.models.resnet18()", "None"), made)
    for statement in statements():
        if not statement.startswith("orepa.expand"):
            exec(statement, made)
    return made


@pytest.mark.parametrize("said", EXPECTED)
def test_each_statement_is_the_ablation_it_says(said: str, names: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Small().double()
    made = eval(expansions()[said], {**names, "model": model})
    found = {
        path: (block.scaling_layer, " ".join(block.branches))
        for path, block in made.named_modules()
        if isinstance(block, ConvBlock) and path in ("stem", "conv", "point")
    }
    point = {"point"} if said == "without post-addition norm" else set()
    assert {path: found[path] for path in found.keys() - point} == EXPECTED[said]
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert has_norms == (said != "without post-addition norm")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(made.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-12)


def test_every_statement_that_expands_is_looked_at() -> None:
    assert expansions().keys() == EXPECTED.keys()


def test_the_table_names_every_block() -> None:
    rows = set(re.findall(r"^\| `(\w+)`", TEXT, re.MULTILINE))
    exported = {
        name for name, value in vars(orepa.public).items() if isinstance(value, orepa.Block)
    }
    assert rows == exported
    assert len(BLOCKS) == len(rows) + 1  # and the dense branch of OREPA_VGG


def test_the_dilated_kernels_are_those_of_the_code() -> None:
    written = {
        int(size): tuple((int(k), int(d)) for k, d in re.findall(r"\((\d+), (\d+)\)", pairs))
        for size, pairs in re.findall(r"(\d+): ((?:\(\d+, \d+\)\s*)+)", TEXT)
    }
    assert written == DILATED_KERNELS
