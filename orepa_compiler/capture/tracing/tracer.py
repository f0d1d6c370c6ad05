"""Records the calls of one forward as an fx graph, its children as leaves."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.capture.arguments import Arguments, AskedFor
from orepa_compiler.capture.constants import OF_NUMBERS
from orepa_compiler.capture.effects.finding import Effects, Surroundings
from orepa_compiler.capture.tracing.kinds import inferred_type, kind_of_leaf
from orepa_compiler.capture.tracing.proxies import Proxy
from orepa_compiler.containers import items, rebuilt

# Gives what a child returns, from its path as the caller sees it and the arguments of the call:
# containers and constants with the nodes of the child's graph in them, or OPAQUE.
Returned = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
OPAQUE = object()

_CHECKED = (type(None), bool, int, float, str, tuple, list, dict, enum.Enum)


class ChildrenAreLeaves(fx.Tracer):
    """forward: the name of the method that runs. buffers: whether a buffer is a node of the graph
    also where no node uses it directly.
    """

    def __init__(
        self,
        *,
        forward: str = "forward",
        buffers: bool = False,
        arguments: Arguments | None = None,
        returned: Returned | None = None,
        is_model: bool = False,
        around: Surroundings | None = None,
    ) -> None:
        super().__init__()
        self.traced_func_name = forward
        self.proxy_buffer_attributes = buffers
        self.arguments, self.returned = arguments or Arguments(), returned
        self.is_model = is_model  # who calls it is not known
        self.around = around or Surroundings()
        self.attributes_set = self.around.attributes_set
        self.effects: Effects | None = None
        self.weights_asked_for: dict[str, fx.Proxy] = {}
        self.stopped_by = ""

    def stopped(self, why: str) -> fx.proxy.TraceError:
        """The error that ends the trace; remembered, for the forward may catch it and go on."""
        self.stopped_by = self.stopped_by or why
        return fx.proxy.TraceError(why)

    def sets(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute of a module is about to be set."""
        if self.effects is not None:
            self.effects.set_on(module, name, value)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.stopped("symbolically traced variables cannot be used as inputs to control flow")

    def is_none_of(self, node: fx.Node, classes: tuple[type, ...]) -> None:
        """A value was asked whether it is one of these, and said no: an argument may be another."""
        if self.is_model and self.effects is not None and node.op == "placeholder":
            self.effects.types.setdefault(str(node.target), {}).update(dict.fromkeys(classes))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.stopped("it iterates over a value whose length a trace does not know")

    def attribute_of(self, node: fx.Node) -> Any:
        """What a get_attr node stands for; None for any other node."""
        if node.op != "get_attr":
            return None
        *path, name = str(node.target).split(".")
        holder = self.root
        for part in path:
            holder = holder._modules[part]  # type: ignore[assignment]
        held = (holder._parameters, holder._buffers, vars(holder))  # asked, it gives a stand-in
        return next((own[name] for own in held if name in own), None)

    def create_arg(self, a: Any) -> Any:
        """As fx; but a weight of the model that is not inside of this module is a node too."""
        name = self.around.tensors.get(id(a)) if isinstance(a, Tensor) else None
        if name and self.effects and not any(a is own for own in _tensors_of(self.root)):
            self.effects.read(a, False)
            self.effects.found[f"uses {name}, which is not inside of it"] = None
            return self.create_node("call_function", outside, (name,), {})
        used = self.effects.tensors if self.effects and isinstance(a, Tensor) else None
        if used is not None and (stand_in := used.stand_ins.get(id(a))):
            return stand_in.node
        node: Any = super().create_arg(a)
        if used is not None and used.is_of_numbers(a):
            node.meta[OF_NUMBERS] = a.detach().clone()
        return node

    def written_over(self, tensor: Tensor) -> Proxy | None:
        """What stands for a tensor into which a stand-in is written; None for one of the model's.

        Its numbers go into the graph, and what is written over them.
        """
        used = self.effects.tensors if self.effects else None
        if used is None or not used.is_of_numbers(tensor):
            return None
        if not used.is_alone(tensor):
            raise self.stopped("it writes into a part of a tensor that it makes")
        proxy = Proxy(self.create_arg(tensor), self)
        used.stand_ins[id(tensor)] = proxy
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.effects is not None:
            self.effects.look()
        return super().create_node(*args, **kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, *more: Any, **options: Any) -> Any:
        """As fx; but a parameter may have a default of any kind, which only its own forward has."""
        if kind == "placeholder":
            args = tuple(map(self._default, args))
        return super().create_proxy(kind, target, args, *more, **options)

    def _default(self, value: Any) -> Any:
        try:
            self.create_arg(value)
        except NotImplementedError:
            assert self.effects is not None
            self.effects.found["takes an argument whose default no graph can hold"] = None
            return None
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        function, given = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [given[0], *map(self._argument, given[1:])]

    def _argument(self, proxy: Proxy) -> Any:
        """The constant that a parameter always is, or its proxy."""
        name = str(proxy.node.target)
        if name in self.arguments.constants:
            value = self.arguments.constants[name]
            if self.is_model:
                self._check(proxy, value)
            if name.startswith("**") and type(value) is dict:
                assert self.effects is not None
                return AskedFor(self._given(value), self.effects.asked)
            return value
        proxy.node.meta["kind"] = self.arguments.kinds.get(name)
        return proxy

    def _given(self, named: dict[str, Any]) -> dict[str, Any]:
        """What is given by name, with stand-ins where it is any tensor."""
        given = dict(named)
        for name, value in named.items():
            if value is Tensor:
                given[name] = self.create_proxy("placeholder", name, (), {})
                given[name].node.meta["kind"] = Tensor
        return given

    def _check(self, proxy: Proxy, value: Any) -> None:
        """What makes a forward that is written anew refuse other calls than the one traced."""
        if not isinstance(value, _CHECKED):
            assert self.effects is not None
            self.effects.found["takes an argument that no graph can compare"] = None
            return
        test = operator.is_ if value is None else operator.eq
        same = self.create_proxy("call_function", test, (proxy, value), {})
        message = (
            f"this model's forward was written anew for calls with {proxy.node.target}={value!r}; "
            "give inputs= of the calls that you make"
        )
        self.create_proxy("call_function", torch._assert, (same, message), {})

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if m not in (self.submodule_paths or {}) and (path := self.around.modules.get(id(m))):
            assert self.effects is not None
            self.effects.reads.update([path, *_paths_inside(self.around, m)])
            raise self.stopped(f"it calls {path}, which is not registered inside of it")
        proxy = super().call_module(m, forward, args, kwargs)
        value = OPAQUE if self.returned is None else self.returned(proxy.node.target, args, kwargs)
        if value is OPAQUE:
            proxy.node.meta["kind"] = kind_of_leaf(m, args)
            return proxy
        return self._unpacked(proxy, value)

    def _unpacked(self, proxy: Proxy, value: Any) -> Any:
        """What a call gives: the containers and constants that the child makes, proxies inside."""
        value = _named_tuple(value)
        if isinstance(value, fx.Node):
            proxy.node.meta["kind"] = inferred_type(value)
            return proxy
        if (held := items(value)) is None:
            return value
        proxy.node.meta["kind"] = type(value)
        parts = [self._unpacked(self._item(proxy, key), part) for key, part in held]
        return rebuilt(value, parts)

    def _item(self, proxy: Proxy, key: Any) -> Any:
        return self.create_proxy("call_function", operator.getitem, (proxy, key), {})


def outside(name: str) -> Tensor:
    """Stands in a graph for a weight of the model that is not inside of the graph's module."""
    raise RuntimeError(f"the graph reads {name} from outside, and cannot be run")


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _paths_inside(around: Surroundings, module: nn.Module) -> Iterator[str]:
    return (around.modules[id(part)] for part in module.modules() if id(part) in around.modules)


def _named_tuple(value: Any) -> Any:
    """A named tuple of nodes, where a node makes one; any other value as it is."""
    is_made = isinstance(value, fx.Node) and isinstance(value.target, type)
    if is_made and hasattr(value.target, "_fields"):
        return value.target(*value.args, **value.kwargs)
    return value
