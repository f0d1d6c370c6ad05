"""What every test shares: torchvision that imports beside any torch, and fixed seeds."""

from __future__ import annotations

import random

import pytest
import torch

from orepa_compiler.model_source import declare_torchvision_operators

# Before any test module imports torchvision.
declare_torchvision_operators()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
