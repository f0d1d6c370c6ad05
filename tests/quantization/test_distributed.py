"""Training in two processes: both end with the same integers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.processes import run_group
from tests.quantization.distributed import data_parallel


@pytest.mark.parametrize("once", [False, True])
def test_data_parallel_processes_agree_on_every_integer(once: bool) -> None:
    first, second = run_group(data_parallel, 2, once)
    assert len(first) == 6
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name
