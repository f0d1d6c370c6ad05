"""Optional packages, imported only where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from orepa_compiler.errors import MissingPackage


def import_extra(package: str, *, extra: str) -> ModuleType:
    """The optional `package`, or one line that names the extra which installs it.

    Raises MissingPackage when the package is not installed. One that is installed but broken raises
    its own error.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        raise MissingPackage(
            f"this needs the package {package}; "
            f"install it with: pip install 'orepa-compiler[{extra}]'"
        ) from error
