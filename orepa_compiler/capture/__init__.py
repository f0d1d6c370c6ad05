"""What a model does, module by module: one fx graph for each forward, with the children as leaves.

Capturing works on a copy without values (the meta device), so it runs no arithmetic, costs little
memory, and cannot change the user's model. Paths are those of the model's named_modules; a node is
found again by its name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.capture.arguments import Arguments
from orepa_compiler.capture.beside import beside_graphs, held_by_hooks
from orepa_compiler.capture.calls import Call as Call
from orepa_compiler.capture.calls import Capture as Capture
from orepa_compiler.capture.calls import ancestors as ancestors
from orepa_compiler.capture.calls import join as join
from orepa_compiler.capture.constants import reads_form
from orepa_compiler.capture.effects.finding import Surroundings, surroundings_of
from orepa_compiler.capture.effects.remembering import code_kept
from orepa_compiler.capture.recording import Recording
from orepa_compiler.capture.skeleton import (
    aliases_of,
    check_wrapper,
    meta_copy,
    tied_modules,
    uncollected,
)
from orepa_compiler.capture.tracing.forward import has_forward
from orepa_compiler.capture.tracing.patching import modules_patched
from orepa_compiler.capture.visiting import Visits


@torch.inference_mode(False)  # whose tensors do not tell when they are written over
@modules_patched()
@uncollected()
def capture(
    model: nn.Module,
    *,
    training: bool | None,
    is_leaf: Callable[[nn.Module], bool],
    recording: Recording | None = None,
    flips: bool = False,
    copies: bool = True,
) -> Capture:
    """The capture of a model as it runs in train or in eval mode; None: as it is, no graph made.

    is_leaf: modules whose inside is of no interest, though they have children. recording: graphs
    for the forwards that cannot be traced. flips: as it runs where gradients are off, in inference
    mode and under autocast. copies: False for a model without values, which is taken as it is.
    Raises ReparamError for a model that is wrapped, scripted, or cannot be copied.
    """
    check_wrapper(model)
    held = held_by_hooks(model)
    skeleton = meta_copy(model) if copies else model
    if training is None:
        return _captured(skeleton, lambda module: True, Recording())
    skeleton.train(training)
    # A forward may draw random numbers while it is traced, and count in a global variable.
    with torch.random.fork_rng(devices=[]), code_kept(skeleton):
        found = _captured(skeleton, is_leaf, recording or Recording(), flips=flips)
    return replace(found, kept={**found.kept, **held}) if held else found


@torch.inference_mode(False)  # whose tensors do not tell when they are written over
@modules_patched()
@uncollected()
def untraced_owners(
    model: nn.Module,
    *,
    is_leaf: Callable[[nn.Module], bool],
    recording: Recording | None = None,
    modes: Iterable[bool] = (False, True),
) -> set[str]:
    """The modules whose forward cannot be traced, in any of these modes: True is train mode.

    recording: what is known of real calls, and the ways in which the model is called; the usual one
    where there are none.
    """
    skeleton = meta_copy(model)
    owners: set[str] = set()
    for training in modes:
        skeleton.train(training)
        with torch.random.fork_rng(devices=[]), code_kept(skeleton):
            captured = _captured(skeleton, is_leaf, recording or Recording())
            owners |= captured.untraced.keys()
    return owners


def _captured(
    skeleton: nn.Module,
    is_leaf: Callable[[nn.Module], bool],
    recording: Recording,
    *,
    flips: bool = False,
) -> Capture:
    aliases = aliases_of(skeleton)
    around = replace(surroundings_of(skeleton), flips=flips)
    graphs, untraced, recorded, arguments = _forwards(skeleton, aliases, is_leaf, recording, around)
    for path in _doubtful_owners(graphs, untraced, recorded, aliases):
        del graphs[path]
    reads: dict[str, list[str]] = defaultdict(list)
    for path, owners in recording.reads.items():
        reads[path] += owners
    for owner, holder in _reads(graphs):
        path = aliases.get(join(owner, holder), (holder,))[0]
        reads[path].append(owner)
    doubtful = {path: why for path, why in recording.doubtful.items() if path in recorded}
    beside = beside_graphs(skeleton, graphs, recorded, around)
    return Capture(
        skeleton,
        graphs,
        untraced,
        _calls(graphs, aliases),
        aliases,
        dict(reads),
        tied_modules(skeleton),
        frozenset(recorded & graphs.keys()),
        {**beside.steered, **doubtful},
        arguments,
        beside.kept,
    )


def _forwards(
    skeleton: nn.Module,
    aliases: dict[str, tuple[str, ...]],
    is_leaf: Callable[[nn.Module], bool],
    recording: Recording,
    around: Surroundings,
) -> tuple[dict[str, fx.Graph], dict[str, str], set[str], dict[str, Arguments]]:
    """The graphs of the forwards; why others have none; which were recorded; their arguments."""
    graphs: dict[str, fx.Graph] = {}
    untraced: dict[str, str] = {}
    recorded: set[str] = set()
    modules = dict(skeleton.named_modules())

    def has_graph(module: nn.Module) -> bool:
        return has_own_forward(module) and not is_leaf(module)

    visits = Visits(modules, aliases, has_graph, is_leaf, around)
    leaves = {path for path, module in modules.items() if is_leaf(module)}
    owners = [
        path
        for path, module in modules.items()
        if has_graph(module) and leaves.isdisjoint(ancestors(path))
    ]
    fitting = {
        path: graph for path, graph in recording.graphs.items() if _fits(graph, modules.get(path))
    }
    for path in owners:
        visits.visit(path, () if path else recording.arguments)
        if isinstance(visits.graphs[path], str) and path in fitting:
            visits.visit_called(path, fitting[path])
    for path in owners:
        graph = visits.graphs[path]
        if not isinstance(graph, str):
            graphs[path] = graph
        elif path in fitting:
            graphs[path] = fitting[path]
            recorded.add(path)
        elif path in recording.refused:
            untraced[path] = f"{graph}; when it was recorded, {recording.refused[path]}"
        else:
            untraced[path] = f"{graph}; give inputs= to record a real forward"
    return graphs, untraced, recorded, visits.arguments()


def _fits(graph: fx.Graph, module: nn.Module | None) -> bool:
    """Whether a recorded forward, and every module that it calls, is still there."""
    if module is None:
        return False
    children = {path for path, _ in module.named_modules(remove_duplicate=False)}
    return all(node.target in children for node in _calls_in(graph))


def _doubtful_owners(
    graphs: dict[str, fx.Graph],
    untraced: dict[str, str],
    recorded: set[str],
    aliases: dict[str, tuple[str, ...]],
) -> set[str]:
    """Owners that nobody calls, though their children are called one by one, or may be.

    Two graphs would then tell of one child. What nobody calls at all (the auxiliary heads of a
    net in eval mode) is as good as called, unless a recorded forward may call it another time.
    """
    reached: set[str] = set()
    called: set[str] = set()
    open_ends = ["", *(path for path in graphs if untraced.keys() & set(ancestors(path)))]
    while open_ends:
        path = open_ends.pop()
        if path in graphs and path not in reached:
            reached.add(path)
            called.update(targets := _targets(path, graphs[path], aliases))
            open_ends += targets
    return {
        path
        for path in graphs.keys() - reached
        if recorded & set(ancestors(path))
        or called.intersection(_targets(path, graphs[path], aliases))
    }


def _targets(owner: str, graph: fx.Graph, aliases: dict[str, tuple[str, ...]]) -> list[str]:
    """The modules that a graph calls, by their first paths."""
    return [aliases[join(owner, str(node.target))][0] for node in _calls_in(graph)]


def _calls_in(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module"]


def _calls(
    graphs: dict[str, fx.Graph], aliases: dict[str, tuple[str, ...]]
) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = defaultdict(list)
    for owner, graph in graphs.items():
        for node in _calls_in(graph):
            calls[aliases[join(owner, str(node.target))][0]].append(Call(owner, node))
    return dict(calls)


def _reads(graphs: dict[str, fx.Graph]) -> Iterator[tuple[str, str]]:
    """Owners with a child whose parameter their forward uses."""
    for owner, graph in graphs.items():
        for node in graph.nodes:
            if node.op == "get_attr" and (holder := _read_module(node)):
                yield owner, holder


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module is more than a container: children or parameters, and a forward."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    holds = bool(module._modules or module._parameters) and not isinstance(module, _ConvNd)
    return holds and has_forward(module)


def _read_module(node: fx.Node) -> str | None:
    """The child whose parameter a get_attr node uses for more than its dtype or shape."""
    holder = str(node.target).rpartition(".")[0]
    uses = [user for user in node.users if not reads_form(user)]
    return holder if holder and uses else None
