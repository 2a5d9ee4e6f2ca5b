"""What can go wrong, and the exit code each kind has on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import VerificationReport


class ExportError(Exception):
    """Base of all errors that this package raises on purpose: one message that names the thing and how to fix it."""

    exit_code = 1


class UsageError(ExportError):
    """Wrong usage, unreadable input, or a path that cannot be written."""

    exit_code = 2


class NotRanked(UsageError):
    """The outputs of a file are not known to score classes."""


class MismatchError(ExportError):
    """The artefact does not compute what the model computes.

    Args:
        message: What differs, by how much, and where first.
        report: The `VerificationReport`, if there is one.
    """

    exit_code = 3

    def __init__(self, message: str, report: VerificationReport | None = None) -> None:
        super().__init__(message)
        self.report = report


class DeviceError(ExportError):
    """A device, library or extra that was asked for is not there."""

    exit_code = 4
