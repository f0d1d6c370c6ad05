"""Every published block: importing it fills the registry."""

from __future__ import annotations

from benchmarks.field import mixtures, mobile, sequences, sums
from benchmarks.field.registry import BLOCKS, Published

__all__ = ["BLOCKS", "Published", "mixtures", "mobile", "sequences", "sums"]
