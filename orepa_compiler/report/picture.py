"""Draws the error over the feature map, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ReparamError
from orepa_compiler.files.atomic import staged
from orepa_compiler.verification.divergence import Divergence


def save_picture(divergence: Divergence, path: Path) -> None:
    """Writes the error of the first diverging module, position by position, as an image.

    Raises ReparamError where there is no feature map, or the ending is no image's; MissingPackage
    without matplotlib.
    """
    figures = import_extra("matplotlib.figure", extra="plots")
    if not divergence.error_map:
        raise ReparamError(
            f"{divergence.module} gives {divergence.shape}, which is no feature map: there is "
            "nothing to draw"
        )
    figure = figures.Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(divergence.error_map, cmap="magma", vmin=0)
    figure.colorbar(image, label="error / largest value of the truth")
    axes.set_title(f"{divergence.module} ({divergence.kind})")
    try:
        with staged(path) as draft:
            figure.savefig(draft)
    except ValueError as error:
        raise ReparamError(f"{path}: {error}") from error
