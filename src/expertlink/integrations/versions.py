"""Which versions of a framework an integration was tested with, and what is raised elsewhere."""

from __future__ import annotations

import re
from importlib import metadata

from expertlink.errors import ConfigurationError, ExpertlinkError


class FrameworkVersionError(ExpertlinkError, ImportError):
    """A framework is missing, or of a version that the integration was not tested with."""


class UnsupportedModelError(ConfigurationError):
    """A model without expert blocks that the integration knows, or that cannot be cut like this."""


def require(distribution: str, *, since: str, before: str, remedy: str = "") -> None:
    """Checks the installed version of a framework, without importing it.

    Args:
        distribution: its name, as pip lists it.
        since: first version that was tested.
        before: first version that was not.
        remedy: what else to do, at the end of the message.

    Raises:
        FrameworkVersionError: it is not installed, or of another version.
    """
    wanted = f"expertlink was tested with {distribution} >={since},<{before}"
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise FrameworkVersionError(f"{distribution} is not installed; {wanted}{remedy}") from None
    if not _release(since) <= _release(version) < _release(before):
        raise FrameworkVersionError(f"{distribution} {version} is installed; {wanted}{remedy}")


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: (5, 23, 0) of "5.23.0.dev1"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
