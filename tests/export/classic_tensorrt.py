"""Classic TensorRT as far as it can be had without a GPU: its names, over tensorrt_rtx's code.

tensorrt_api.json holds the public names of the classic bindings, class by class, as dir() lists
them in the wheels tensorrt_cu12_bindings 10.12 and 10.16 and tensorrt_cu13_bindings 11.4;
tensorrt_names.py writes it. The stand-in answers to no other name, so code that runs on it uses
what each version has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "tensorrt_api.json").read_text()
)

# These are subclassed, or assigned to a layer's __class__, so they must be the real ones.
_AS_THEY_ARE = {"ILogger", "IProgressMonitor", "IElementWiseLayer"}


class Limited:
    """An object that answers only to the names that one class has in one version."""

    def __init__(self, real: Any, kind: str, version: str) -> None:
        vars(self).update(_real=real, _kind=kind, _version=version)

    def _check(self, name: str) -> None:
        if name not in NAMES[self._version][self._kind].split():
            raise AttributeError(f"{self._kind}.{name} is not in {self._version}")

    def __getattr__(self, name: str) -> Any:
        self._check(name)
        if (self._kind, name) == ("Builder", "build_serialized_network"):
            return self._build
        return self._wrap(getattr(self._real, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            vars(self)["_kind"] = value.__name__
        else:
            self._check(name)
        setattr(self._real, name, _unwrap(value))

    def _wrap(self, value: Any) -> Any:
        kind = value.__name__ if isinstance(value, type) else type(value).__name__
        if kind in NAMES[self._version] and kind not in _AS_THEY_ARE and kind != "DataType":
            is_enumerator = hasattr(value, "value") and not isinstance(value, type)
            return value if is_enumerator else Limited(value, kind, self._version)
        return self._call(value) if callable(value) and not isinstance(value, type) else value

    def _call(self, function: Any) -> Any:
        return lambda *arguments: self._wrap(function(*map(_unwrap, arguments)))

    def __call__(self, *arguments: Any) -> Any:
        return self._wrap(self._real(*map(_unwrap, arguments)))

    def _build(self, network: Any, config: Any) -> Any:
        # Classic TensorRT builds for the GPU at hand; here one has to be named.
        import tensorrt_rtx

        real = _unwrap(config)
        real.num_compute_capabilities = 1
        real.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return self._real.build_serialized_network(_unwrap(network), real)


def _unwrap(value: Any) -> Any:
    return vars(value)["_real"] if isinstance(value, Limited) else value


class ClassicTensorRT(Limited):
    """The module."""

    def __init__(self, version: str) -> None:
        import tensorrt_rtx

        super().__init__(tensorrt_rtx, "module", version)
        vars(self).update(__name__="tensorrt", __version__=version)
