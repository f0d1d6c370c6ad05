"""What is a container, what it holds, and how one like it is made."""

from __future__ import annotations

from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from orepa_compiler.capture.effects.nested import tensors
from orepa_compiler.containers import attributes, items, mapped, members, rebuilt, shown
from orepa_compiler.verification.nesting import map_tensors, named_leaves, tensors_in

Boxes = namedtuple("Boxes", "boxes scores")


class Steps(list[Any]):
    pass


class Output(OrderedDict[str, Any]):
    """As the outputs of transformers: a dict whose keys are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclass(frozen=True)
class Sample:
    image: Tensor
    names: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    image: Tensor


class Registered:
    def __init__(self, one: Any, two: Any) -> None:
        self.one, self.two = one, two


pytree.register_pytree_node(
    Registered,
    lambda value: ([value.one, value.two], None),
    lambda parts, _: Registered(*parts),
)

ONE = torch.ones(2)
HOLDERS: dict[str, Any] = {
    "dict": {"a": ONE},
    "ordered": OrderedDict(a=ONE),
    "default": defaultdict(list, a=ONE),
    "list": [ONE],
    "list of the user's": Steps([ONE]),
    "tuple": (ONE,),
    "named tuple": Boxes(ONE, None),
    "deque": deque([ONE], maxlen=3),
    "of fx": immutable_list([immutable_dict(a=ONE)]),
    "mapping of the user's": UserDict(a=ONE),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_container_is_walked_and_made_again_as_it_was(name: str) -> None:
    value = HOLDERS[name]
    for found in (tensors(value), tensors_in(value)):
        assert [id(tensor) for tensor in found] == [id(ONE)]
    doubled = map_tensors(value, lambda tensor: tensor * 2)
    assert doubled is not value
    assert type(doubled) is type(value)
    assert [tensor.tolist() for tensor in tensors_in(doubled)] == [[2, 2]]
    assert ONE.tolist() == [1, 1]


def test_attributes_of_a_container_stay_with_it() -> None:
    output = Output(logits=ONE)
    doubled = map_tensors(output, lambda tensor: tensor * 2)
    assert doubled.logits.tolist() == doubled["logits"].tolist() == [2, 2]
    assert output.logits is ONE
    assert map_tensors(HOLDERS["deque"], torch.clone).maxlen == 3
    assert map_tensors(HOLDERS["default"], torch.clone).default_factory is list


@pytest.mark.parametrize("made", [Sample(ONE, ["cat"]), Slotted(ONE), Registered(ONE, [None])])
def test_what_is_found_in_an_object_is_changed_there(made: Any) -> None:
    doubled = map_tensors([made], lambda tensor: tensor * 2)[0]
    assert type(doubled) is type(made)
    assert [tensor.tolist() for tensor in tensors_in(doubled)] == [[2, 2]]
    assert [tensor.tolist() for tensor in tensors_in(made)] == [[1, 1]]


def test_names_are_the_keys_fields_and_numbers() -> None:
    value = {"a": Boxes(ONE, (ONE, None)), "b": Sample(ONE), "c": deque([ONE])}
    assert list(named_leaves(value)) == ["a.boxes", "a.scores.0", "b.image", "c.0"]


def test_a_set_has_no_keys_and_no_order() -> None:
    assert items({1}) is shown({1}) is None
    assert members({1}) == members(frozenset([1])) == [1]
    assert list(named_leaves({ONE})) == ["output"]  # a leaf, which cannot be compared


def test_what_is_no_container_is_a_leaf() -> None:
    for leaf in (None, 1, "text", ONE, nn.Linear(1, 1), range(3), slice(0, 1)):
        assert items(leaf) is members(leaf) is shown(leaf) is None
        assert mapped(leaf, id) == id(leaf)


def test_the_code_of_a_mapping_is_asked_for_the_arguments_of_calls_only() -> None:
    assert items(UserDict(a=1)) is members(UserDict(a=1)) is None
    assert shown(UserDict(a=1)) == [("a", 1)]
    assert shown(UserList([1])) is None
    frozen = MappingProxyType({"a": 1})
    assert rebuilt(frozen, [2]) is frozen  # nobody but its class can make another


def test_attributes_are_those_in_slots_too() -> None:
    assert attributes(Slotted(ONE)) == [("image", ONE)]
    assert attributes(Sample(ONE)) == [("image", ONE), ("names", [])]
    assert attributes(1) is None
    assert [id(tensor) for tensor in tensors(Slotted(ONE))] == [id(ONE)]
