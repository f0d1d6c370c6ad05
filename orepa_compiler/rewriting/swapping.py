"""Changing the module tree: swap a child, or give one owner a new graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import fx, nn

# (names of the nodes that go, name of the node they read, name of the new child, the new child);
# the last node of the part gives its value.
Part = tuple[Sequence[str], str, str, nn.Module]

_OWNER_STATE = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


# The methods by which modules of others turn into their deploy form.
METHODS = ("fuse", "reparameterize", "switch_to_deploy")


class _Rewritten(fx.GraphModule):
    """A GraphModule that is still of its owner's class, in copies and pickles too.

    torch's own forget the class, the hooks and the attributes: isinstance would answer another way
    in the forward around it, and train() would no longer be the owner's.
    """

    owner_class: ClassVar[type[nn.Module]]

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        type(copied).__name__ = self.owner_class.__name__
        _copy_hooks(self, copied)
        vars(copied).update(copy.deepcopy(_further_attributes(self, copied), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps(self.owner_class)
        except Exception:  # a class in a function has no name to be found by
            return super().__reduce__()
        return _unpickled, (self.owner_class, super().__reduce__())


class _Plain(nn.Module):
    """Stands before the owner's class, whose constructor made its object long ago."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


@property  # type: ignore[misc]
def _gone(self: nn.Module) -> Any:
    raise AttributeError(f"{type(self).__name__} was rewritten, and has no such method any more")


def _new(owner_class: type[nn.Module], root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module of the owner's class that runs the graph, with what it needs of the root.

    It has no method that would turn it into a deploy form: its children are others by now.
    """
    bases: tuple[type[nn.Module], ...] = (_Rewritten, _Plain)
    bases += () if issubclass(owner_class, fx.GraphModule) else (owner_class,)
    gone = {name: _gone for name in METHODS if hasattr(owner_class, name)}
    made = type(owner_class.__name__, bases, {"owner_class": owner_class, **gone})
    module: fx.GraphModule = made(root, graph, class_name=owner_class.__name__)
    _copy_hooks(root, module)
    vars(module).update(_further_attributes(root, module))
    return module


def _unpickled(
    owner_class: type[nn.Module], made: tuple[Callable[..., fx.GraphModule], tuple[Any, ...]]
) -> fx.GraphModule:
    function, arguments = made
    module = function(*arguments)
    return _new(owner_class, module, module.graph).train(module.training)


def _copy_hooks(source: nn.Module, target: nn.Module) -> None:
    for state in _OWNER_STATE:
        setattr(target, state, copy.copy(getattr(source, state)))


def _further_attributes(owner: nn.Module, rewritten: fx.GraphModule) -> dict[str, Any]:
    """What the user's class keeps on the object beside tensors and modules (out_channels, flags).

    Methods of the old object are left out: they would run it.
    """
    return {
        name: value
        for name, value in vars(owner).items()
        if name not in vars(rewritten)
        and not hasattr(fx.GraphModule, name)
        and getattr(value, "__self__", None) is not owner
    }


def set_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The root with `module` at `path`; the new root is the module itself where the path is ""."""
    if not path:
        return module
    owner, _, name = path.rpartition(".")
    root.get_submodule(owner)._modules[name] = module
    return root


def set_module_everywhere(root: nn.Module, paths: Sequence[str], module: nn.Module) -> nn.Module:
    """The root with `module` at each of the paths under which another was registered."""
    for path in paths:
        root = set_module(root, path, module)
    return root


def exchange(root: nn.Module, module: nn.Module, new: nn.Module) -> nn.Module:
    """The root with the new module wherever it holds another one now."""
    held = root.named_modules(remove_duplicate=False)
    paths = [path for path, part in held if part is module]
    return set_module_everywhere(root, paths, new)


def replace_regions(owner: nn.Module, graph: fx.Graph, parts: Sequence[Part]) -> fx.GraphModule:
    """The owner with parts of its graph replaced by one module each, as a GraphModule.

    The class name, the hooks and the attributes of the owner survive; children that no node calls
    any more are dropped. graph: a trace of the owner's own forward, with its children as leaves.
    """

    def edit(copied: fx.Graph) -> None:
        new_names: dict[str, str] = {}
        for nodes, source, target, _ in parts:
            _splice(copied, nodes, new_names.get(source, source), target, new_names)

    return edit_graph(owner, graph, edit, {target: module for _, _, target, module in parts})


def edit_graph(
    owner: nn.Module,
    graph: fx.Graph,
    edit: Callable[[fx.Graph], None],
    modules: dict[str, nn.Module],
) -> fx.GraphModule:
    """The owner as a GraphModule that runs an edited copy of its graph."""
    edited = copy.deepcopy(graph)
    edit(edited)
    for node in edited.nodes:
        node.type = None  # an annotation kept as a string makes code that cannot be pickled
    for name, module in modules.items():
        owner.add_module(name, module)
    rewritten = _new(getattr(type(owner), "owner_class", type(owner)), owner, edited)
    for name in modules:
        owner._modules.pop(name)
    rewritten.train(owner.training)
    return rewritten


def free_name(owner: nn.Module, name: str) -> str:
    """`name`, or with a number behind it where the owner has such an attribute already."""
    taken, number = name, 1
    while hasattr(owner, taken):
        number += 1
        taken = f"{name}{number}"
    return taken


def _splice(
    graph: fx.Graph, nodes: Sequence[str], source: str, target: str, new_names: dict[str, str]
) -> None:
    """Replaces the nodes by one call; remembers under which name the last one's value lives on."""
    by_name = {node.name: node for node in graph.nodes}
    last = by_name[nodes[-1]]
    with graph.inserting_after(last):
        new = graph.create_node("call_module", target, (by_name[source],))
    last.replace_all_uses_with(new)
    new_names[last.name] = new.name
    for name in reversed(nodes):
        graph.erase_node(by_name[name])
    graph.lint()
