"""Finds the blocks, inputs and models that the words of a command line name."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from orepa_compiler.blocks import Block
from orepa_compiler.blocks.catalogue import named as block_of_the_catalogue
from orepa_compiler.checkpoints import load
from orepa_compiler.checkpoints.reading import has_plan, read_checkpoint
from orepa_compiler.checkpoints.states import Weights, find_state
from orepa_compiler.checkpoints.training_form import is_training_form, load_training_form
from orepa_compiler.checkpoints.weights import Loaded, put_into
from orepa_compiler.cli.given.forward_arguments import signature_text
from orepa_compiler.cli.given.options import SIDES as SIDES
from orepa_compiler.cli.given.options import ExitCode as ExitCode
from orepa_compiler.cli.given.options import NotVerified as NotVerified
from orepa_compiler.cli.given.options import shape
from orepa_compiler.errors import ReparamError
from orepa_compiler.model_source import folder_of, importable, is_of_a_zoo, load_model
from orepa_compiler.model_source.preprocessing import preprocessing_of
from orepa_compiler.progress import announced
from orepa_compiler.verification.nesting import others_in, tensors_in

# The seed of a model's own random weights and of the inputs: the same command, the same numbers.
SEED = 0

# What random whole numbers are below: small enough for any table that they may be looked up in.
MOST_OF_WHOLE = 2

_WHOLE = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}

Shape = tuple[int, ...]


def named_block(name: str, *, option: str = "--block") -> Block | Literal["auto"]:
    """The block of that name, or "auto". Raises ReparamError, with the names, for any other."""
    try:
        return block_of_the_catalogue(name)
    except ReparamError as error:
        raise ReparamError(f"{option} {name}: {error.reason}") from error


def typed_shape(text: str) -> tuple[Shape, torch.dtype | None]:
    """(3, 224, 224) from `3x224x224`, and int64 from `16:int64`; None stands for floating point.

    Raises ReparamError for anything else.
    """
    sizes, colon, name = text.partition(":")
    if colon and name not in _WHOLE:
        raise ReparamError(f"--input-shape {text}: after the colon, write {', '.join(_WHOLE)}")
    return shape(sizes), _WHOLE.get(name)


def random_inputs(
    shapes: Sequence[Shape],
    batch: int,
    *,
    dtypes: Sequence[torch.dtype | None] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """One tensor of shape (batch, *shape) for each shape; always the same.

    Normally distributed, of `dtype`, or whole numbers below MOST_OF_WHOLE where dtypes says so.
    """
    generator = torch.Generator().manual_seed(SEED)
    kinds = [*dtypes, *[None] * (len(shapes) - len(dtypes))]
    return tuple(
        torch.randn((batch, *entry), generator=generator).to(dtype)
        if kind is None
        else torch.randint(MOST_OF_WHOLE, (batch, *entry), generator=generator).to(kind)
        for entry, kind in zip(shapes, kinds, strict=True)
    )


def inputs_for(
    source: str, model: nn.Module, texts: Sequence[str] | None, batch: int
) -> tuple[Tensor, ...]:
    """Random inputs of the shapes given, else of the size that the model was published for."""
    shapes = [typed_shape(text) for text in texts or ()]
    if not shapes:
        shapes = [(preprocessing_of(source, model).shape, None)]
    sizes, dtypes = zip(*shapes, strict=True)
    return random_inputs(sizes, batch, dtypes=dtypes, dtype=floating_type(model))


def floating_type(model: nn.Module) -> torch.dtype:
    """What the model's floating weights are stored in: its inputs have to come in it."""
    types = (t.dtype for t in model.parameters() if t.is_floating_point())
    return next(types, torch.float32)


def load_source(
    source: str,
    checkpoint: Path | None,
    *,
    inputs: tuple[Any, ...] | None,
    allow_pickle: bool = False,
    num_classes: int | None = None,
    weights: Weights | None = None,
    is_quiet: bool = False,
) -> nn.Module:
    """The model that `source` names with the weights of `checkpoint`, in eval mode.

    A checkpoint that orepa.save wrote also rebuilds the expanded model, and so does the plain
    state_dict of one. Where the weights are random, a line on stderr says so, unless is_quiet.
    Raises ReparamError for any mistake in the names or in the file, and when the model does not run
    on `inputs`.
    """
    model, told = load_told(
        source,
        checkpoint,
        inputs=inputs,
        allow_pickle=allow_pickle,
        num_classes=num_classes,
        weights=weights,
    )
    if not is_quiet:
        warn_of_random_weights(source, told)
    return model


def warn_of_random_weights(source: str, told: str) -> None:
    """A line on stderr, at once, where what is compared or written means nothing yet."""
    if told.startswith("random"):
        print(f"{source}: warning: {told}", file=sys.stderr)


def load_told(
    source: str,
    checkpoint: Path | None,
    *,
    inputs: tuple[Any, ...] | None = None,
    allow_pickle: bool = False,
    pretrained: bool = False,
    num_classes: int | None = None,
    weights: Weights | None = None,
    expanded: str | None = None,
) -> tuple[nn.Module, str]:
    """The model as load_source gives it, and one line about where its weights are from."""
    with announced(f"loading {source}"):
        torch.manual_seed(SEED)
        model = load_model(source, pretrained=pretrained, num_classes=num_classes)
        if checkpoint is not None:
            block = None if expanded is None else named_block(expanded, option="--expanded")
            with importable(folder_of(source)):
                model, loaded = _loaded(model, checkpoint, allow_pickle, weights, block)
            told = str(loaded)
        elif pretrained:
            told = "the weights that were downloaded"
        elif is_of_a_zoo(source):
            told = "random weights: give --checkpoint FILE or --pretrained"
        else:
            told = "no --checkpoint: the weights that the model came with"
        model, told = _in_single(model.eval(), told)
        if inputs is not None:
            check_it_runs(source, model, inputs)
    return model, told


def _in_single(model: nn.Module, told: str) -> tuple[nn.Module, str]:
    """A model in half precision with its weights in float32, which is exact, and a word of it."""
    dtype = floating_type(model)
    if dtype not in (torch.float16, torch.bfloat16):
        return model, told
    return model.float(), f"{told}; {str(dtype).removeprefix('torch.')} weights read as float32"


def _loaded(
    model: nn.Module,
    path: Path,
    allow_pickle: bool,
    weights: Weights | None,
    block: Block | Literal["auto"] | None,
) -> tuple[nn.Module, Loaded]:
    if has_plan(path):
        model = load(model, path)
        return model, Loaded(len(model.state_dict()), block="with their plan, the recorded")
    found = find_state(path, read_checkpoint(path, allow_pickle), weights)
    if is_training_form(found.state, model):
        return load_training_form(model, path, found, block=block)
    if block is not None:
        raise ReparamError(f"--expanded: {path} holds no blocks in training form; leave it out")
    return model, put_into(model, path, found)


def check_it_runs(source: str, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a model gives on inputs; ReparamError, with the likely cause, where it does not run."""
    try:
        with torch.no_grad():
            given = model(*inputs)
    except Exception as error:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        said = " ".join(str(error).split())
        raise ReparamError(
            f"{source}: does not run on inputs of shape {shapes} ({said}); "
            f"{_cause(model, tensors, error)}"
        ) from error
    return given


def check_tensors(source: str, given: Any) -> None:
    """Raises ReparamError where a forward returned what cannot be compared or exported."""
    kinds = [type(leaf).__name__ for leaf in others_in(given)]
    if kinds or not any(True for _ in tensors_in(given)):
        raise ReparamError(
            f"{source}: its forward returns {f'a {kinds[0]}' if kinds else 'no tensor'}; it must "
            "return tensors, alone or in tuples, lists and dicts"
        )


def _cause(model: nn.Module, tensors: Sequence[Tensor], error: Exception) -> str:
    """What to do about a model that does not run: by its weights, its signature or its inputs."""
    meta = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if meta:
        return (
            f"{meta[0]} is on the meta device, without values: build the model on the CPU, or give "
            "--checkpoint FILE"
        )
    if isinstance(error, TypeError) and "argument" in str(error):
        return (
            f"its forward takes {signature_text(model)}: give --input-shape once for each, or "
            "--inputs file.py:function that gives them"
        )
    own = floating_type(model)
    other = [t.dtype for t in tensors if t.is_floating_point() and t.dtype != own]
    if other or re.search(r"\b(d?types?)\b", str(error).lower()):
        types = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        return (
            f"its weights are {str(own).removeprefix('torch.')} and the inputs {types}: give whole "
            "numbers as --input-shape 16:int64, or inputs of the right type with --inputs"
        )
    return "give the right --input-shape, once for each input"
