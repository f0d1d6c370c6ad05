"""Traces a torch model into a program of aten operators, and reads that program."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.images import axis_names, is_image
from orepa_compiler.export.onnx.liveness import live_nodes
from orepa_compiler.verification.nesting import registered_children

CONVS = {"aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"}
_NORM = "aten::batch_norm"

# Operators that behave otherwise in training -> which argument says so.
_TRAIN_FLAGS = {
    _NORM: 5,
    "aten::dropout": 2,
    "aten::feature_dropout": 2,
    "aten::alpha_dropout": 2,
    "aten::feature_alpha_dropout": 2,
}
_BERNOULLI = {"aten::bernoulli", "aten::bernoulli_"}


def trace_program(
    model: nn.Module, batch: tuple[Any, ...], *, dynamic_batch: bool, dynamic_size: bool = False
) -> ExportedProgram:
    """Traces the model's forward on `batch` as aten operators.

    The first axis of each input is a symbol with dynamic_batch; heights and widths, with
    dynamic_size, where the forward does not fix them.

    Raises ExportError where torch.export fails.
    """
    shapes = None
    if dynamic_batch:
        batch = _two_or_more(batch)
    if dynamic_batch or dynamic_size:
        batch_axis = {0: Dim("batch")} if dynamic_batch else {}
        free = Dim.AUTO if dynamic_size else None
        shapes = pytree.tree_map(lambda leaf: _symbols(leaf, batch_axis, free), batch)
    try:
        with quiet(), torch.no_grad():
            return _exported(model, batch, shapes)
    except Exception as error:  # whatever the model's own forward raises while it is traced
        reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
        advice = "; where forward fixes the batch size, pass dynamic_batch=False"
        advice += " (of a size: no dynamic_size)" if dynamic_size else ""
        raise ExportError(
            f"torch.export cannot trace the model ({type(error).__name__}: {reason.strip()})"
            + (advice if dynamic_batch else "")
        ) from error


def _symbols(leaf: Any, batch_axis: dict[int, Any], free: Any) -> dict[int, Any] | None:
    """Says which axes of an input are symbols; None for what is no tensor."""
    if not _has_batch(leaf):
        return None
    sizes = axis_names(leaf.dim()) if free is not None and is_image(leaf) else {}
    return {**batch_axis, **dict.fromkeys(sizes, free)}


def _exported(model: nn.Module, batch: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """Lets torch.export make the program: by running the forward, or else by reading its code.

    Some read numbers out of tensors, which only the second way follows: the mask of a length.
    """
    try:
        return torch.export.export(model, batch, dynamic_shapes=shapes)
    except Exception as first:
        try:
            return torch.export.export(model, batch, dynamic_shapes=shapes, strict=True)
        except Exception:
            raise first from None


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _two_or_more(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    # torch.export takes an axis of size 1 for a constant, so a lone example is doubled.
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if _has_batch(leaf)}
    if len(sizes) != 1:
        raise ExportError(
            f"the inputs have first axes of sizes {sorted(sizes)}, not one batch size; "
            "pass dynamic_batch=False"
        )
    if sizes != {1}:
        return batch
    return pytree.tree_map(lambda leaf: torch.cat([leaf] * 2) if _has_batch(leaf) else leaf, batch)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and log lines: the artifact is checked afterwards, by us."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def count_convs(program: ExportedProgram) -> int:
    """Counts the convolutions that a traced forward runs, transposed ones not counted."""
    return sum(_is_conv(node) for node in program_nodes(program))


def train_mode_modules(program: ExportedProgram) -> list[str]:
    """Paths of the modules that ran as in training: dropout, and norms by batch statistics.

    The `training` flags of the modules do not tell: a new plain conv has it set, and no meaning.
    """
    live = live_nodes(program)
    nodes = (node for node in program_nodes(program) if node in live)
    return [_module_path(node) for node in nodes if _is_training(node)]


def _is_training(node: fx.Node) -> bool:
    operator = operator_name(node)
    if operator == _NORM and node.args[3] is None:
        return False  # a norm without running statistics uses those of the batch in eval too
    flag = _TRAIN_FLAGS.get(operator)
    return operator in _BERNOULLI or (flag is not None and bool(node.args[flag]))


def foldable_norms_in_program(program: ExportedProgram) -> list[str]:
    """Finds the BatchNorms, in eval form, that a collapse would have folded into a conv.

    Those are the sole readers of a conv's result. A conv that runs several times is left out, for
    no one kernel could hold its different norms.
    """
    live = live_nodes(program)
    return [
        _module_path(node)
        for node in program_nodes(program)
        if node in live and _is_eval_norm(node) and _runs_alone(node.args[0], live)
    ]


def output_names(program: ExportedProgram) -> list[str]:
    """Names the tensors that a model returns.

    `output` for a lone tensor, output_0, output_1, ... for a sequence, the keys for a dict; deeper
    levels are joined with a dot. None has no place in a file and is left out.
    Raises ExportError for anything else.
    """
    outputs = program.graph_signature.output_specs
    returned = [spec.arg for spec in outputs if spec.kind is OutputKind.USER_OUTPUT]
    names = []
    for path, index in _output_paths(program):
        argument = returned[index]
        if isinstance(argument, TensorArgument):
            names.append(_leaf_name(path))
        elif getattr(argument, "value", argument) is not None:
            raise ExportError(f"{_leaf_name(path)} is no tensor; return tensors (or None) only")
    return names


def returned_names(given: Any) -> tuple[list[str], bool]:
    """Names the tensors that a forward returned, as output_names does, before anything is traced.

    Also tells whether the forward names them itself, with keys or fields.
    """
    paths = list(_tensor_paths(given, ()))
    is_named = any(path and not isinstance(path[0], int) for path in paths)
    return [_leaf_name(path) for path in paths], is_named


def _tensor_paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, Tensor):
        yield path
        return
    if pytree.tree_structure(value).is_leaf():  # None, or a class that torch.export does not know
        return
    for key, child in registered_children(value):
        yield from _tensor_paths(child, (*path, key))


def named_outputs(
    program: ExportedProgram, names: tuple[str, ...], inputs: tuple[str, ...]
) -> tuple[str, ...]:
    """Names a file's outputs: as given, or else as output_names does.

    Raises ExportError where there are more or fewer, where the model has named them already, and
    for an output that is called as an input is to be.
    """
    own = tuple(output_names(program))
    if names and returns_mapping(program):
        raise ExportError(
            f"output_names: the model returns its outputs by name ({', '.join(own)}), and they "
            "are compared by these names; rename the keys in its forward, or leave it out"
        )
    if names and len(names) != len(own):
        raise ExportError(
            f"output_names: {len(names)} names ({', '.join(names)}) for {len(own)} outputs "
            f"({', '.join(own)}); give one for each"
        )
    found = names or own
    if taken := [name for name in found if name in inputs]:
        raise ExportError(f"input_names: {taken[0]!r} is the name of an output; give another")
    return found


def returns_mapping(program: ExportedProgram) -> bool:
    """Whether the model returns its tensors by name."""
    return any(path and not isinstance(path[0], int) for path, _ in _output_paths(program))


@dataclass(frozen=True)
class _Returned:
    number: int


def _output_paths(program: ExportedProgram) -> list[tuple[tuple[Any, ...], int]]:
    """Lists the keys that lead to each returned value, and its number among them."""
    spec = program.call_spec.out_spec
    leaves = [_Returned(index) for index in range(spec.num_leaves)]
    return list(_numbered(pytree.tree_unflatten(leaves, spec), ()))


def _numbered(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    if isinstance(value, _Returned):
        yield path, value.number
        return
    for key, child in registered_children(value):
        yield from _numbered(child, (*path, key))


def _leaf_name(path: tuple[Any, ...]) -> str:
    if not path:
        return "output"
    return ("output_" if isinstance(path[0], int) else "") + ".".join(map(str, path))


def program_nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    """Yields every node of a traced program, those of the bodies of its branches included."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def operator_name(node: Any) -> str:
    """Names the operator that a node calls, such as aten::add; else nothing."""
    target = getattr(node, "target", None)
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _is_conv(node: Any) -> bool:
    # aten::convolution's seventh argument tells whether it is transposed.
    return operator_name(node) in CONVS and not (len(node.args) > 6 and node.args[6] is True)


def _is_eval_norm(node: fx.Node) -> bool:
    return operator_name(node) == _NORM and not node.args[5]


def _runs_alone(node: Any, live: set[fx.Node]) -> bool:
    return _is_conv(node) and all(len(live & {*n.users}) == 1 for n in (node, node.args[1]))


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else node.name
