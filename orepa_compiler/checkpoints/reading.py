"""Reads a file of weights without running code: safetensors, or what torch.save wrote."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from orepa_compiler.errors import CheckpointError

# The metadata key under which `save` keeps the plan beside the weights.
PLAN_KEY = "orepa"

# The attribute of a stand-in that says what it stands for.
_STANDS_FOR = "_orepa_stands_for"

# A file that is not a zip names one unknown class at a time; no trainer's names more.
_MOST_CLASSES = 50


def has_plan(path: str | Path) -> bool:
    """Whether `save` wrote this file: a checkpoint with the plan that rebuilds the expanded model.

    Raises CheckpointError when the file cannot be read.
    """
    path = Path(path)
    with _reading(path):
        if not _is_safetensors(path):
            return False
        with safe_open(path, framework="pt") as file:
            return PLAN_KEY in (file.metadata() or {})


def read_checkpoint(
    path: Path, allow_pickle: bool, *, otherwise: str = ", or pass --allow-pickle if you trust it"
) -> Any:
    """Reads a safetensors file, or a file of torch.save.

    Objects of classes that stand beside the weights (options, paths, a callback's state) come as
    empty stand-ins: their classes are not imported and none of their code runs. With allow_pickle
    everything is unpickled as it was. otherwise: what else the error about code advises.
    Raises CheckpointError for any other file, and for objects that cannot be stood in for.
    """
    with _reading(path):
        if path.is_file() and not path.stat().st_size:
            raise CheckpointError(f"{path}: the file is empty; save or copy it again")
        if _is_safetensors(path):
            return load_file(path)
        if allow_pickle:
            return torch.load(path, map_location="cpu", weights_only=False)
        return _without_code(path, otherwise)


def stands_for(value: Any) -> str | None:
    """Names the class of an object that was not unpickled; None for anything that was."""
    return vars(value).get(_STANDS_FOR) if type(value) is OrderedDict else None


def runs_code(path: Path, named: str, otherwise: str) -> CheckpointError:
    """Words the error about weights inside an object whose class would have to be imported."""
    return CheckpointError(
        f"{path}: reading this pickle runs code (it names {named}); save model.state_dict() "
        f"instead{otherwise}"
    )


def _without_code(path: Path, otherwise: str) -> Any:
    names = _unknown_classes(path)
    for _ in range(_MOST_CLASSES):
        stands = [(_stand_in(name), name) for name in names]
        try:
            with torch.serialization.safe_globals([*_numpy_values(), *stands]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None and not names:
                raise
            named = names[0] if found is None else found[1]
            if found is None or named in names or "blocked" in str(error):
                raise runs_code(path, named, otherwise) from error
            names.append(named)
        except (TypeError, ValueError, AttributeError) as error:
            if not names:
                raise
            raise runs_code(path, names[0], otherwise) from error
    raise runs_code(path, names[0], otherwise)


def _unknown_classes(path: Path) -> list[str]:
    """Lists the classes and functions that the file names and torch does not know to be safe."""
    try:
        with torch.serialization.safe_globals(_numpy_values()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, pickle.UnpicklingError):  # not a zip: each is met as it comes
        return []


def _stand_in(name: str) -> Callable[..., Any]:
    """Makes a class whose objects are empty and do nothing, whatever they are made of.

    An OrderedDict, because torch lets a pickle put items into nothing else.
    """

    def make(cls: type, *arguments: object, **named: object) -> OrderedDict[Any, Any]:
        made: OrderedDict[Any, Any] = OrderedDict()
        vars(made)[_STANDS_FOR] = name
        return made

    return type("StandIn", (), {"__new__": make})


def _numpy_values() -> list[Any]:
    """Lists what a number or an array of numpy in a pickle names: a run's best accuracy, say."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    types = [value for value in vars(np.dtypes).values() if isinstance(value, type)]
    # numpy 1 and numpy 2 write two names for the same.
    named = [
        (function, f"numpy.{core}.multiarray.{function_name}")
        for core in ("core", "_core")
        for function, function_name in ((scalar, "scalar"), (rebuild, "_reconstruct"))
    ]
    return [np.dtype, np.ndarray, *types, *named]


def _is_safetensors(path: Path) -> bool:
    # A safetensors file: the header's length in eight bytes, then the header, a JSON object.
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: this is a folder; name the file in it") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: a damaged safetensors file ({error})") from error
    except (ModuleNotFoundError, AttributeError) as error:
        # A whole pickled model is a reference to its class, which has to be importable.
        raise CheckpointError(
            f"{path}: holds objects whose class cannot be imported here ({error}); name the model "
            "as path/to/file.py:factory in the folder that has that module, or set PYTHONPATH to "
            "it, or save model.state_dict() where it was trained"
        ) from error
    except Exception as error:  # unpickling can raise anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: neither safetensors nor a torch.save file ({type(error).__name__}: {reason})"
        ) from error
