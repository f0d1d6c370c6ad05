"""Makes the model that a string names: what a command line can say about a model."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from orepa_compiler.choices import FORMS as FORMS
from orepa_compiler.errors import MissingPackage, ReparamError

# The endings of files that hold weights.
_OF_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar")


def load_model(
    source: str, *, pretrained: bool = False, num_classes: int | None = None
) -> nn.Module:
    """The model that `source` names, with the weights its factory gives it.

    Nothing is downloaded for a name of torchvision or timm, unless `pretrained`: its weights are
    random. num_classes: of such a model, where it is not the one it was published with.

    source: `torchvision:resnet50`, `timm:resnet50`, `package.module:factory` or
    `path/to/file.py:factory`. A factory is called without arguments; a module that stands there
    ready made is taken as it is. The current folder, and a file's own folder, can be imported from,
    as when python runs a file.

    Raises ReparamError for a name that is not there (with the closest ones), for a factory that is
    not callable, needs arguments, fails or gives no nn.Module, for options that it cannot take, and
    where weights cannot be downloaded. Raises MissingPackage when
    torchvision or timm is not installed.
    """
    place, colon, name = source.rpartition(":")
    if not (colon and place and name):
        if Path(source).suffix in _OF_WEIGHTS:
            raise ReparamError(
                f"{source}: weights alone are no model; name the model ({FORMS}) and give the file "
                "with --checkpoint"
            )
        raise ReparamError(f"{source}: this names no model; write it as {FORMS}")
    declare_torchvision_operators()
    if place == "torchvision":
        models = _zoo(source, "torchvision.models")

        def build() -> nn.Module:
            parameters = inspect.signature(models.get_model_builder(name)).parameters
            # Detectors and segmenters download a trained backbone unless told not to.
            options: dict[str, Any] = {"weights": "DEFAULT"} if pretrained else {}
            options |= {"weights_backbone": None} if "weights_backbone" in parameters else {}
            options |= {} if num_classes is None else {"num_classes": num_classes}
            model: nn.Module = models.get_model(name, **options)
            return model

        return _from_zoo(source, name, models.list_models(), build)
    if place == "timm":
        timm = _zoo(source, "timm")
        given = {} if num_classes is None else {"num_classes": num_classes}
        return _from_zoo(
            source,
            name,
            timm.list_models(),
            lambda: timm.create_model(name, pretrained=pretrained, **given),
        )
    check_options(source, pretrained, num_classes)
    return _from_factory(source, place, name)


def is_of_a_zoo(source: str) -> bool:
    """Whether a name is one of torchvision or timm, whose weights are random unless downloaded."""
    return source.rpartition(":")[0] in ("torchvision", "timm")


def check_options(source: str, pretrained: bool, num_classes: int | None) -> None:
    """Raises ReparamError for options that a factory of the user's own has no place for."""
    given = [("--pretrained", pretrained), ("--num-classes", num_classes is not None)]
    for option, is_given in given:
        if is_given and not is_of_a_zoo(source):
            raise ReparamError(
                f"{source}: {option} goes with a name of torchvision or timm; a factory decides "
                "this itself"
            )


def folder_of(source: str) -> Path:
    """The folder that what a source names is imported from: a file's own, else the current one."""
    path = Path(source.rpartition(":")[0])
    return path.resolve().parent if path.suffix == ".py" else Path.cwd()


def declare_torchvision_operators() -> None:
    """The operators torchvision::nms and torchvision::qnms, declared where they are missing.

    A torchvision that was built for CUDA does not load its compiled part beside a CPU torch, and
    its import then fails with "operator torchvision::nms does not exist". The models need only the
    operators' names.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    boxes = "Tensor dets, Tensor scores, float iou_threshold"
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", f"({boxes}) -> Tensor")


def _zoo(source: str, module: str) -> ModuleType:
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(
            f"{source}: this needs the package {package}; install it with: pip install {package}"
        )
    return importlib.import_module(module)


def _from_zoo(
    source: str, name: str, known: list[str], build: Callable[[], nn.Module]
) -> nn.Module:
    # A timm name may carry the tag of its weights: resnet50.a1_in1k.
    if name.split(".")[0] not in known:
        raise ReparamError(
            f"{source}: no model of {len(known)} has this name{_closest(name, known)}"
        )
    try:
        return build()
    except Exception as error:  # a download, a number of classes that the head does not allow, ...
        raise ReparamError(f"{source}: building it raised {_one_line(error)}") from error


def check_function(source: str) -> None:
    """Raises ReparamError for a string that cannot name a function; nothing is imported."""
    place, colon, name = source.rpartition(":")
    if not (colon and place and name):
        raise ReparamError(
            f"{source}: this names no function; write it as package.module:function or "
            "path/to/file.py:function"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ReparamError(f"{source}: there is no file {place}")


def load_function(source: str) -> Callable[..., Any]:
    """The function that `source` names. Raises ReparamError as load_model does."""
    check_function(source)
    place, _, name = source.rpartition(":")
    with _found(source, place, name) as function:
        if not callable(function):
            raise ReparamError(f"{source}: {name} is a {type(function).__name__}, not a function")
        found: Callable[..., Any] = function
        return found


def call_source(source: str) -> Any:
    """What the function that `source` names returns, called without arguments.

    source: `package.module:function` or `path/to/file.py:function`. An iterator comes as a list.
    Raises ReparamError as load_model does.
    """
    check_function(source)
    place, _, name = source.rpartition(":")
    with _found(source, place, name) as function:
        if not callable(function) or _needed_arguments(function):
            raise ReparamError(f"{source}: {name} is not a function that needs no arguments")
        try:
            result = function()
            return list(result) if isinstance(result, Iterator) else result
        except (Exception, SystemExit) as error:
            raise ReparamError(f"{source}: calling {name}() raised {_one_line(error)}") from error


def _from_factory(source: str, place: str, name: str) -> nn.Module:
    with _found(source, place, name) as factory:
        return _call(source, name, factory)


@contextmanager
def _found(source: str, place: str, name: str) -> Iterator[Any]:
    path = Path(place)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ReparamError(f"{source}: there is no file {place}")
    with importable(folder_of(source)), _own_command_line(place):
        module = _import_file(source, path) if is_file else _import_module(source, place)
        factory = getattr(module, name, None)
        if factory is None:
            public = [key for key in vars(module) if not key.startswith("_")]
            raise ReparamError(f"{source}: {place} defines no {name}{_closest(name, public)}")
        yield factory


@contextmanager
def _own_command_line(place: str) -> Iterator[None]:
    """A training script that reads its command line finds an empty one, and not ours."""
    ours = sys.argv
    sys.argv = [place]
    try:
        yield
    finally:
        sys.argv = ours


def _call(source: str, name: str, factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ReparamError(
            f"{source}: {name} is of type {type(factory).__name__}, not a factory; name a function "
            f"that returns the model"
        )
    needed = _needed_arguments(factory)
    if needed:
        raise ReparamError(
            f"{source}: {name} needs the arguments {', '.join(needed)}; name a function that needs "
            f"none, such as a functools.partial of it"
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ReparamError(f"{source}: calling {name}() raised {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ReparamError(
            f"{source}: {name}() gave a {type(model).__name__}, not a torch.nn.Module"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError(
            f"{source}: {name}() gave TorchScript; give the nn.Module that it was scripted from"
        )
    return model


def _needed_arguments(factory: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a builtin tells no signature; calling it will say what it needs
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _import_module(source: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ReparamError(f"{source}: importing it raised {_one_line(error)}") from error
        raise ReparamError(
            f"{source}: there is no module {error.name} here or among the installed packages; "
            f"models are written as {FORMS}"
        ) from error
    except (Exception, SystemExit) as error:  # a script may read its own command line
        raise ReparamError(f"{source}: importing it raised {_one_line(error)}") from error


def _import_file(source: str, path: Path) -> ModuleType:
    name = f"_orepa_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may read its own command line
        raise ReparamError(f"{source}: importing it raised {_one_line(error)}") from error
    return module


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules of this folder can be imported inside."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _closest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _one_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"SystemExit({error.code!r}): it ends the program; put that below __main__"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
