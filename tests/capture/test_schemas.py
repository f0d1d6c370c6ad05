"""The tables of operators, against the schemas and tags of torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orepa_compiler.capture.memory import _FRESH
from orepa_compiler.capture.schemas import _WRITING, OF_FORM, draws, overloads, writes

HOMES = (torch, Tensor, F)
SCHEMAS = {s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas()}
PUBLIC = {n for n in SCHEMAS if not n.startswith("_")}
NAMES = sorted(n for n in PUBLIC if any(hasattr(home, n) for home in HOMES))
# No operators on tensors: seeds, streams, and a write that is another operand's.
_NOT_ON_TENSORS = {"manual_seed", "seed", "record_stream", "retain_grad"}
_WRITE_ANOTHER = {"fused_moving_avg_obs_fake_quant", "batch_norm_update_stats", "sort"}


def schemas(name: str) -> list[Any]:
    """Those of a function that make their result, and are given none to write to."""
    found = [each._schema for each in overloads(name)]
    return [schema for schema in found if not any(given.is_out for given in schema.arguments)]


def test_names_say_what_schemas_say_is_written_over() -> None:
    assert len(NAMES) > 700
    for name in NAMES:
        given = [s.arguments for s in schemas(name) if s.arguments]
        firsts = [a[0].alias_info for a in given]
        is_written = any(alias and alias.is_write for alias in firsts)
        if name not in _NOT_ON_TENSORS | _WRITE_ANOTHER:
            assert is_written == writes(name) or not given, name


def test_the_operators_of_python_that_write_are_those_tensors_have() -> None:
    in_place = {f"__i{name.strip('_')}__" for name in dir(Tensor) if name.startswith("__")}
    ours = {name for name in dir(Tensor) if name in in_place} - {"__idiv__"}  # not of Python 3
    assert ours | {"__setitem__"} == _WRITING


def test_what_is_tagged_as_random_is_known_to_draw() -> None:
    seeded = torch.Tag.nondeterministic_seeded
    tagged = {name for name in NAMES if any(seeded in each.tags for each in overloads(name))}
    assert {"exponential_", "rrelu", "bernoulli", "dropout"} <= tagged
    assert all(draws(name) for name in tagged)
    assert not [name for name in NAMES if draws(name) and name not in tagged]


@pytest.mark.parametrize("name", ["dropout2d", "feature_alpha_dropout", "gumbel_softmax"])
def test_functions_in_python_that_draw_are_known_by_their_names(name: str) -> None:
    assert hasattr(F, name)
    assert draws(name)


def test_what_tells_the_form_gives_no_tensor_and_hangs_on_no_value() -> None:
    for name in OF_FORM:
        for each in overloads(name):
            gives = [str(part.type) for part in each._schema.returns]
            assert not any("Tensor" in kind for kind in gives), name
            assert torch.Tag.data_dependent_output not in each.tags, name


def test_no_schema_of_a_fresh_result_says_it_is_a_view() -> None:
    for name in _FRESH:
        assert not any(part.alias_info for s in schemas(name) for part in s.returns), name
