"""Defines the errors that a user can meet; each says where, what and what to do in one line."""

from __future__ import annotations


class ReparamError(Exception):
    """The base of every error that this package raises on a user's input.

    path: the module path the error speaks of; the public function that knows it adds it once, in
    front of the message.
    """

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message if path is None else f"{path or '(the model itself)'}: {message}")
        self.reason = message


class NotLinear(ReparamError):
    """Layers that are not one convolution, with the reason (often what happens at the border)."""


class MissingPackage(ReparamError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class CheckpointError(ReparamError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class NoVerdict(ReparamError):
    """A comparison that cannot be judged, as with a reference that is random: not a pass."""


class ExportError(ReparamError):
    """An artifact that could not be written, or that would not be what was asked for."""


class TrainingFormWarning(UserWarning):
    """A model that still makes its kernels at each call goes where a collapsed one belongs."""


class NothingExpandedWarning(UserWarning):
    """expand gave back a model without a block: it trains as it was; the message says why."""


class NormsLeftWarning(UserWarning):
    """A collapse that leaves norms behind convs; the message names the first ones, and why."""


class Int8RangeWarning(UserWarning):
    """An int8 file that loses most channels of a layer; the message says which, and what helps."""


class NotRun(ExportError):
    """What is needed to run an artifact is not here (a GPU, a provider): no verdict on it."""


class Interrupted(ReparamError):
    """A command that Ctrl-C ended; the message says what it had written by then."""
