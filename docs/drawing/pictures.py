"""What is drawn: a conv, its norm and its activation, before and after each pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import orepa_compiler as orepa
from docs.drawing.graphs import graph_of
from docs.drawing.svg import side_by_side
from orepa_compiler.passes import Pipeline
from orepa_compiler.passes.expand import Expand
from orepa_compiler.passes.linearize import Linearize


def plain() -> nn.Module:
    """A conv of 64 channels as a ResNet has them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU())


def unsqueezed(block: orepa.Block = orepa.OREPA) -> nn.Module:
    """The same after the pass expand alone."""
    made, _ = Pipeline((Expand(block=block),)).run(plain())
    return made


def squeezed() -> nn.Module:
    return orepa.expand(plain(), block=orepa.OREPA)


def linearized() -> nn.Module:
    made, _ = Pipeline((Linearize(),)).run(unsqueezed(orepa.DBB))
    return made


def expand() -> str:
    graphs = [("before", graph_of(plain())), ("after", graph_of(unsqueezed()))]
    return side_by_side(graphs, "A conv becomes six branches with scaling layers, and their sum")


def linearize() -> str:
    graphs = [("before", graph_of(unsqueezed(orepa.DBB))), ("after", graph_of(linearized()))]
    return side_by_side(graphs, "Norms in branches become scaling layers, one norm after the sum")


def squeeze() -> str:
    graphs = [("before", graph_of(unsqueezed())), ("after", graph_of(squeezed()))]
    return side_by_side(graphs, "Branches on feature maps become kernels, and one conv")


def cut() -> str:
    kept = ("origin", "pointwise")
    names = [name for name in orepa.OREPA.branches if name not in kept]
    after = orepa.cut(squeezed(), branches=names)
    graphs = [("before", graph_of(squeezed())), ("after", graph_of(after))]
    return side_by_side(graphs, "Some branches of a block go, and its function stays")


def collapse() -> str:
    graphs = [("before", graph_of(squeezed())), ("after", graph_of(orepa.collapse(squeezed())))]
    return side_by_side(graphs, "A block and its norm become one conv with a bias")


PICTURES: dict[str, Callable[[], str]] = {
    picture.__name__: picture for picture in (expand, linearize, squeeze, cut, collapse)
}
