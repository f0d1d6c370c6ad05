"""What the forwards of a model do beside their graphs, and whom it concerns.

One forward sets an attribute that another reads, counts in a shared object, or uses a weight that
it reached through a list: the graph of neither shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from orepa_compiler.capture.calls import hooks_of
from orepa_compiler.capture.effects.finding import Seen, Surroundings, seen_of
from orepa_compiler.capture.effects.state import Visible, held_values, visible_to
from orepa_compiler.capture.tracing.bytecode import functions_of, names_read


@dataclass(frozen=True)
class Beside:
    """steered: owner path -> why its next call may go another way than its graph.

    kept: module path -> why no other layer may stand there, and it is joined with no other.
    """

    steered: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


def beside_graphs(
    model: nn.Module,
    graphs: Mapping[str, fx.Graph],
    recorded: Collection[str],
    around: Surroundings,
) -> Beside:
    """What was seen beside the graphs while they were made, from the view of all forwards."""
    seen = {path: seen_of(graph) for path, graph in graphs.items()}
    unseen = {path: found for path, found in around.broken.items() if path not in graphs}
    seen |= unseen | {path: around.broken.get(path, Seen()) for path in recorded}
    kept = {
        path: f"the forward of {owner or 'the model'} sets its {name}"
        for owner, found in seen.items()
        for path, name in found.sets
        if path
    }
    for owner, found in seen.items():
        kept |= {path: _used(owner) for path in found.reads if path and path != owner}
    for owner, module in model.named_modules():
        if (owner in graphs and owner not in recorded) or _is_of_torch(module):
            continue
        reached = set(_reachable(module, around))
        kept |= {path: _used(owner) for path in reached if path and not _is_inside(path, owner)}
    steered = {owner: f"it {found.steers}" for owner, found in seen.items() if found.steers}
    return Beside({**_steered_by_others(model, graphs, seen), **steered}, kept)


def held_by_hooks(model: nn.Module) -> dict[str, str]:
    """Module path -> why it is kept: a hook holds it, and may run it, or use its weight.

    model: the user's own. What a hook holds, a copy of the hook holds too.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    kept: dict[str, str] = {}
    for owner, module in model.named_modules():
        for hook in hooks_of(module):
            for held in held_values(hook):
                parts = held.modules() if isinstance(held, nn.Module) else ()
                found = [paths[id(part)] for part in parts if id(part) in paths]
                reason = f"a hook on {owner or 'the model'} may use it, or its weight"
                kept |= dict.fromkeys(filter(None, found), reason)
    return kept


def _steered_by_others(
    model: nn.Module, graphs: Mapping[str, fx.Graph], seen: Mapping[str, Seen]
) -> dict[str, str]:
    """The owners that read what another forward changes, and by whose doing."""
    touched = {home: owner for owner, found in seen.items() for home in found.touched}
    named = {name: owner for owner, found in seen.items() for _, name in found.sets}
    named.pop("training", None)  # every layer reads its own
    children = {path: owner for owner, found in seen.items() for path, _ in found.sets if path}
    if not touched and not named:
        return {}
    steered = {}
    for path in graphs:
        module = model.get_submodule(path)
        functions = functions_of(module)
        read = set().union(*(names_read(f.__code__) for f in functions))
        homes = visible_to(module, functions).all_homes & touched.keys()
        writers = [touched[home] for home in homes] + [named[n] for n in read & named.keys()]
        writers = [writer for writer in writers if writer != path]
        if path in children:
            writers.append(children[path])
        if writers:
            name = writers[0] or "the model"
            steered[path] = f"it reads what the forward of {name} changes"
    return steered


def _used(owner: str) -> str:
    return f"the forward of {owner or 'the model'} uses it, or its weight, where no graph shows it"


def _reachable(module: nn.Module, around: Surroundings) -> Iterator[str]:
    """The paths of the modules that a forward without a graph may reach beside its children."""
    seen: Visible = visible_to(module, functions_of(module))
    for value in seen.values.values():
        for held in held_values(value):
            parts = held.modules() if isinstance(held, nn.Module) else ()
            yield from (around.modules[id(part)] for part in parts if id(part) in around.modules)
            if isinstance(held, Tensor) and (name := around.tensors.get(id(held))):
                yield name.rpartition(".")[0]


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.modules.", "orepa_compiler."))


def _is_inside(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")
