"""Errors that a user can act on. The command prints them as one line; the class decides the exit status."""

from __future__ import annotations


class MlaTrtError(Exception):
    """Base of every error raised on purpose. The message is one line that says what is wrong and what to do."""

    exit_status = 2


class BadModelError(MlaTrtError):
    """The model or another input file cannot be used: not ONNX, truncated, contradictory, unsupported."""


class UsageError(MlaTrtError):
    """An option or an argument has no sense here."""


class NoMlaError(MlaTrtError):
    """No attention layer of the model is multi-head latent attention, or the model must be lowered whole and cannot be."""

    exit_status = 3


class VerificationError(MlaTrtError):
    """The lowered model does not compute what the original computes."""

    exit_status = 4


class NoSessionError(VerificationError):
    """No session of the original can begin with its first token, so that there is nothing to compare."""


class OutOfPagesError(MlaTrtError):
    """The page pool has no room for the tokens asked for. No sequence was changed."""


class QueueFullError(MlaTrtError):
    """As many requests wait as may: try again later."""


class RequestFailedError(MlaTrtError):
    """A request ended with an error after it was accepted."""


class PluginLibraryError(MlaTrtError):
    """The plugin library cannot be built, is missing, or is of another version."""


class ServerError(MlaTrtError):
    """The server cannot be started, or ended by itself."""

    exit_status = 1
