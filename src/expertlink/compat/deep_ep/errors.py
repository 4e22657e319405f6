"""What is raised where a call cannot be made, in the kinds that callers of `deep_ep` catch."""

from __future__ import annotations

from expertlink.errors import InputError


class CallError(InputError, AssertionError):
    """An argument does not fit, or a call is not possible now.

    An AssertionError too, because that is what `deep_ep` raises in these places.
    """


class UnsupportedError(InputError, NotImplementedError):
    """Something that this drop-in leaves out; the message says what, and what to do instead."""


REFUSALS = (CallError, UnsupportedError)
"""What checks that come before a communicator's call raise: the other ranks are to be told."""


def expect(condition: bool, message: str) -> None:
    """Raises CallError with the message unless the condition holds."""
    if not condition:
        raise CallError(message)


def in_kind(error: InputError) -> InputError:
    """An error of a communicator's own checks as callers of `deep_ep` expect it."""
    return error if isinstance(error, REFUSALS) else CallError(str(error))
