"""Linearize: branch norms become scaling layers, and one norm follows the sum.

The three steps of Hu et al. 2022, Fig. 3, for a sum of branches that each are a sequence of linear
layers: convs, average pools, norms anywhere (padded with their own shift, too), scaling layers. So
are the offline blocks that expand makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.analysis.chain_blocks import linear_block, linearized
from orepa_compiler.analysis.chains import ChainInterpreter, Layer, SummedOperator
from orepa_compiler.analysis.elementwise import is_add
from orepa_compiler.blocks import ConvBlock, LinearBlock
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.capture import Call, Capture
from orepa_compiler.capture.tracing.forward import trace
from orepa_compiler.defaults.following import NORM, followed_by
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.passes.linearize.options import (
    LinearizeBlock,
    LinearizeSum,
    change_of,
    change_options,
)
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.planning.overlaps import Touched
from orepa_compiler.rewriting.selection import Where, selection
from orepa_compiler.rewriting.swapping import (
    Part,
    exchange,
    free_name,
    replace_regions,
    set_module_everywhere,
)


@dataclass(frozen=True)
class Linearize:
    """Turns sums of branches with norms of their own into linear blocks with one norm behind.

    Outputs in eval mode stay the same: v = g / sqrt(var + eps) starts each scaling layer, and what
    the branch norms add goes to the bias of the norm behind the sum.
    """

    where: Where = None
    name: str = "linearize"
    training: bool = True
    preserves: frozenset[str] = frozenset({"eval"})

    @torch.enable_grad()  # a kernel that is read knows by it whether it is trained
    def plan(self, capture: Capture) -> Plan:
        interpreter = ChainInterpreter(capture, capture.module, at_any_cost=True)
        is_selected = selection(self.where)
        edits, refusals = [], []
        for owner, found in _sums(capture, interpreter):
            module = capture.module(owner)
            if not is_selected(owner, module):
                continue
            if isinstance(found, str):
                refusals.append(Refusal(self.name, owner, type(module).__name__, found))
                continue
            try:
                region = _region(capture, interpreter, owner, found)
                edits.append(self._edit(capture, region, _block(region, capture.skeleton)))
            except NotLinear as error:
                refusals.append(Refusal(self.name, owner, type(module).__name__, error.reason))
        for path, module in capture.skeleton.named_modules():
            if not isinstance(module, OfflineBlock) or not is_selected(path, module):
                continue
            if reason := capture.hook_refusal(path):
                refusals.append(Refusal(self.name, path, f"block {module.block_name}", reason))
            else:
                edits.append(self._block_edit(capture, path, module))
        return Plan(tuple(edits), tuple(refusals))

    @torch.enable_grad()
    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        for path, edits in groupby(plan.edits, key=lambda edit: edit.path):
            owner = model.get_submodule(path)
            if isinstance(owner, OfflineBlock):
                (change,) = map(change_of, edits)
                new = linearized(owner, with_norm=not _norm_follows(change, path))
                model = set_module_everywhere(model, capture.aliases[path], new)
                continue
            graph = capture.own_graph(path, owner)
            interpreter = ChainInterpreter(capture, model.get_submodule, at_any_cost=True)
            parts: list[Part] = []
            for edit in edits:
                region = _region(capture, interpreter, path, _nodes(change_of(edit), path))
                block = _block(region, model)
                name = free_name(owner, "block") + ("" if not parts else f"_{len(parts) + 1}")
                parts.append((region.nodes, region.source, name, block))
            model = exchange(model, owner, replace_regions(owner, graph, parts))
        return model, plan

    def touched(self, edit: Edit) -> Touched:
        change = change_of(edit)
        if isinstance(change, LinearizeBlock):
            return Touched((edit.path,))
        return Touched((), edit.path, change.nodes)

    def _edit(self, capture: Capture, region: _Sum, new: LinearBlock) -> Edit:
        modules = [capture.module(path) for path in region.paths]
        before = sum(p.numel() for module in modules for p in module.parameters())
        arithmetic = {layer for layer in region.layers if layer.path is None and not layer.is_fixed}
        before += sum(layer.operator.weight.numel() for layer in arithmetic)
        after = sum(p.numel() for p in new.parameters())
        chains = region.operator.chains
        names = [" - ".join(layer.name for layer in chain) or "identity" for chain in chains]
        target = f"linear block with {len(chains)} branches"
        options = change_options(LinearizeSum(tuple(region.nodes), region.source))
        sizes = (before, after)
        return Edit(self.name, region.owner, " + ".join(names), target, sizes, options=options)

    def _block_edit(self, capture: Capture, path: str, block: OfflineBlock) -> Edit:
        """The edit for a block of ours whose branches normalize."""
        norm_follows = followed_by(capture, path) == NORM
        new = linearized(block, with_norm=not norm_follows)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (block, new))
        what = f"{block.block_name}: {' + '.join(block.branches)}"
        target = f"linear block with {len(new.branches)} branches"
        options = change_options(LinearizeBlock(norm_follows))
        return Edit(self.name, path, what, target, (before, after), options=options)


def _norm_follows(change: LinearizeSum | LinearizeBlock, path: str) -> bool:
    if isinstance(change, LinearizeBlock):
        return change.norm_follows
    raise ReparamError("the plan linearizes a sum, here is a block", path=path)


def _nodes(change: LinearizeSum | LinearizeBlock, path: str) -> list[str]:
    if isinstance(change, LinearizeSum):
        return list(change.nodes)
    raise ReparamError("the plan linearizes a block, here is none", path=path)


@dataclass(frozen=True)
class _Sum:
    """A sum of branches in the forward of `owner`. macs: what they cost apart."""

    owner: str
    nodes: list[str]
    source: str
    operator: SummedOperator
    macs: int
    norm_follows: bool

    @property
    def layers(self) -> list[Layer]:
        return [layer for chain in self.operator.chains for layer in chain]

    @property
    def paths(self) -> list[str]:
        """The modules that the branches are made of, each once."""
        return list(dict.fromkeys(layer.path for layer in self.layers if layer.path is not None))


def _sums(capture: Capture, interpreter: ChainInterpreter) -> Iterator[tuple[str, list[str] | str]]:
    """Each maximal region that ends in a sum, as far as that, or why a sum is no region."""
    for region in interpreter.regions(sums_only=True):
        sums = [i for i, node in enumerate(region.value.nodes) if is_add(node)]
        if sums:
            yield region.owner, region.node_names[: sums[-1] + 1]
    for owner, graph in capture.graphs.items():
        module, values = capture.module(owner), interpreter.values(owner)
        if not any(map(is_batch_norm, module.modules())):
            continue
        for node in graph.nodes:
            if is_add(node) and node not in values:
                found = [interpreter.obstacle(owner, operand) for operand in node.all_input_nodes]
                reasons = [interpreter.reasons.get((owner, node.name)), *found]
                for reason in dict.fromkeys(filter(None, reasons)):
                    yield owner, f"a branch of its sum is not linear as a whole: {reason}"
                if not any(reasons) and (refusal := capture.rewrite_refusal(owner)):
                    yield owner, refusal


def _region(capture: Capture, interpreter: ChainInterpreter, owner: str, nodes: list[str]) -> _Sum:
    value = interpreter.value_of(owner, nodes)
    operator, last = value.operator, value.nodes[-1]
    assert isinstance(operator, SummedOperator)
    followers = [user for user in last.users if user.op == "call_module"]
    norm_follows = len(last.users) == 1 and any(
        is_batch_norm(capture.module(capture.path_of(Call(owner, user)))) for user in followers
    )
    region = _Sum(owner, nodes, value.source.name, operator, value.macs, norm_follows)
    if reason := _refusal(capture, region):
        raise NotLinear(reason)
    return region


def _refusal(capture: Capture, region: _Sum) -> str | None:
    """Why a sum of linear branches is left as it is."""
    if any(isinstance(capture.module(path), ConvBlock) for path in region.paths):
        return "a branch holds a block already; linearize before its convs are expanded"
    if not any(layer.is_norm for layer in region.layers):
        return "its branches have no norms: it is linear already"
    if not region.operator.rank:
        return "its branches are linear layers; a block stands for convs"
    if region.operator.macs > region.macs:
        return (
            f"as one conv it would cost {region.operator.macs} MACs for each output position, "
            f"apart it costs {region.macs}; kept apart"
        )
    if _asks_for_mode(capture, region.owner):
        return "its forward differs between train and eval mode, and a rewritten one could not"
    return None


def _asks_for_mode(capture: Capture, path: str) -> bool:
    """Whether the forward of a module reads self.training, or may."""
    owner, arguments = capture.module(path), capture.arguments.get(path)
    mode = owner.training
    traces = [trace(owner.train(training), arguments) for training in (False, True)]
    owner.train(mode)
    return str(traces[0]) != str(traces[1]) or any(isinstance(found, str) for found in traces)


def _block(region: _Sum, model: nn.Module) -> LinearBlock:
    """The linear block of a sum, with the weights that the region was read with."""
    owner = model.get_submodule(region.owner)
    like = next(owner.parameters())
    block = linear_block(region.operator, like, with_norm=not region.norm_follows)
    return block.train(owner.training)
