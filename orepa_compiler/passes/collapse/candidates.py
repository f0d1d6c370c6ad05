"""Finds the linear regions to fold, and the norms of other modules that go with them.

A norm can be found twice: in the region around it, and as what stands behind a conv across a
border (a norm alone in a container is a linear layer to whoever calls it). Each goes once; a region
that holds it already wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from orepa_compiler.analysis.regions import Interpreter, Region
from orepa_compiler.capture import Call, Capture, ancestors
from orepa_compiler.passes.collapse.norms_before import preceding_norms
from orepa_compiler.passes.collapse.norms_behind import crossings

_Key = tuple[str, str]


@dataclass(frozen=True)
class Candidate:
    """A region to fold. before, behind: the paths of norms in other modules that go too."""

    region: Region
    before: str | None = None
    behind: str | None = None

    @property
    def key(self) -> _Key:
        return self.region.owner, self.region.node_names[-1]


@dataclass
class Candidates:
    """What is to be folded, as far as it is found.

    absorbed: (conv, norm), where the conv is no operator. claimed: the paths of all modules that go
    with one of these.
    """

    capture: Capture
    found: dict[_Key, Candidate] = field(default_factory=dict)
    absorbed: list[tuple[str, str]] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)

    def add(self, region: Region, *, before: str | None = None, behind: str | None = None) -> None:
        """Adds a region, or a norm to one that was found."""
        new = Candidate(region)
        old = self.found.get(new.key, new)
        joined = replace(old, before=before or old.before, behind=behind or old.behind)
        self.found[new.key] = joined
        self.claimed.update(called(self.capture, region))
        self.claimed.update(filter(None, (before, behind)))

    @property
    def regions(self) -> list[Candidate]:
        """Those that are left, one owner's together; none in what another calls as one layer.

        A norm that was found outside has joined more than the regions inside.
        """
        outer = {path for one in self.found.values() for path in called(self.capture, one.region)}
        order = {owner: number for number, owner in enumerate(self.capture.graphs)}
        kept = [one for key, one in self.found.items() if not is_inside(key[0], outer)]
        return sorted(kept, key=lambda one: order[one.region.owner])


def find_candidates(interpreter: Interpreter) -> Candidates:
    """All regions with more than one layer, or with a norm on the other side of a border."""
    found = Candidates(interpreter.capture)
    for region in interpreter.regions():
        found.add(region)
    for end, norm in crossings(interpreter):
        if is_inside(norm, found.claimed):
            continue
        if isinstance(end, Region):
            found.add(end, behind=norm)
        elif not is_inside(end, found.claimed):
            found.absorbed.append((end, norm))
            found.claimed |= {end, norm}
    for region, norm in preceding_norms(interpreter):
        if not is_inside(norm, found.claimed):
            found.add(region, before=norm)
    return found


def called(capture: Capture, region: Region) -> Iterator[str]:
    """The paths of the modules that a region calls."""
    for node in region.value.nodes:
        if node.op == "call_module":
            yield capture.path_of(Call(region.owner, node))


def is_inside(path: str, taken: set[str]) -> bool:
    """Whether a module is one of these, or goes with one of these."""
    return not taken.isdisjoint([path, *ancestors(path)])
