"""Who looks on while a kernel is made."""

from __future__ import annotations

import warnings

import torch

from orepa_compiler.errors import TrainingFormWarning


def warn_if_exported() -> None:
    """Warn where torch.jit.trace, torch.export or torch.onnx.export records the branches.

    torch.compile, torch.func and forward-mode differentiation are tools of training: no word there.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        warnings.warn(
            "a model in training form is being exported: the file will make every kernel of its "
            "blocks anew at each call; export orepa.collapse(model) instead",
            TrainingFormWarning,
            stacklevel=2,
        )
