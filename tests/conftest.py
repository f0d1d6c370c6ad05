"""What every test shares: torchvision that imports beside any torch, and fixed seeds."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings

from orepa_compiler.model_source import declare_torchvision_operators

# Before any test module imports torchvision.
declare_torchvision_operators()

# The same examples in every run, however slow the machine is.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
