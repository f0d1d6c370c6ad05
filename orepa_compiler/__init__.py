"""Re-parameterization of conv nets: expand before training, collapse after it.

    model = orepa_compiler.expand(model)       # every eligible conv becomes a block
    ...                                        # your own training loop
    deploy = orepa_compiler.collapse(model)    # plain convs again, norms folded in
    assert orepa_compiler.verify(model, deploy, inputs)
    orepa_compiler.export_onnx(deploy, inputs, "model.onnx")

`orepa_compiler.plan(model)` says first what would be done, and what not, and why.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orepa_compiler.public import *  # noqa: F403

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """A public name: they are all imported, and torch with them, when the first one is asked for.

    The command line answers `--help` and its own mistakes before that.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = vars(importlib.import_module(f"{__name__}.public"))
    names = {key: value for key, value in public.items() if not key.startswith("_")}
    globals().update(names)
    if name in names:
        return names[name]
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    __getattr__("plan")
    return sorted(globals())
