"""docs/phones.md: what both recipes begin with runs; what needs their packages is Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

import orepa_compiler as orepa
from tests.docs.test_readme import BLOCK

PAGE = Path(__file__).parents[2] / "docs" / "phones.md"


def test_the_program_that_both_recipes_take_is_that_of_the_plain_network() -> None:
    (block,) = BLOCK.findall(PAGE.read_text())
    names: dict = {"__name__": "phones"}
    exec(compile(block, "phones.md", "exec"), names)
    assert names["operators"].count("aten.conv2d.default") == 20
    assert len(names["operators"]) == 20 + 17 + 1 + 8 + 3, "convs, relus, pools, sums, head"
    images, program = names["images"], names["program"].module()

    def traced(x: torch.Tensor) -> torch.Tensor:
        return program(x)

    assert orepa.verify(names["model"], traced, images)
    with torch.no_grad():
        names["deploy"].fc.weight.mul_(1.01)
    assert not orepa.verify(names["model"], traced, images), "the program has these weights"


def test_the_recipes_are_python_and_end_in_a_verdict() -> None:
    recipes = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(recipes) == 2
    for recipe in recipes:
        assert isinstance(ast.parse(recipe).body[-1], ast.Assert)
        assert "orepa.verify(model, " in recipe
