"""Putting the drop-in into a process under the name `deep_ep`."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from expertlink.errors import ExpertlinkError
from expertlink.settings import DEEP_EP

_NAME = "deep_ep"
_HOME = "expertlink.compat.deep_ep"
_MODULES = ("", ".utils", ".utils.event")
_MARK = "__expertlink__"


class OtherDeepEPError(ExpertlinkError, ImportError):
    """Another `deep_ep` is loaded or installed; nothing was changed."""


class _Loader(importlib.abc.Loader):
    """Gives a module that exists already. What import machinery asks of it does nothing."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return sys.modules.get(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(*, replace: bool = False) -> None:
    """Lets `import deep_ep` in this process import the drop-in. Local; safe to repeat.

    Other processes do not inherit it: call it in each of them, before it imports what imports
    `deep_ep`.

    Args:
        replace: also where another `deep_ep` is installed, or loaded. Code that has imported that
            one keeps what it has.

    Raises:
        OtherDeepEPError: there is another `deep_ep`.
    """
    loaded = sys.modules.get(_NAME)
    if getattr(loaded, _MARK, False):
        return
    if not replace:
        if _NAME in sys.modules:
            raise OtherDeepEPError(
                f"another deep_ep is loaded, from {getattr(loaded, '__file__', None)}: install "
                "the drop-in before anything imports deep_ep, or pass replace=True"
            )
        found = importlib.util.find_spec(_NAME)
        if found is not None:
            raise OtherDeepEPError(
                f"another deep_ep is installed, at {found.origin}: uninstall it, or pass "
                "replace=True"
            )
    for name in list(sys.modules):
        if name == _NAME or name.startswith(f"{_NAME}."):
            del sys.modules[name]
    for suffix in _MODULES:
        _alias(_NAME + suffix, importlib.import_module(_HOME + suffix))


def install_if_asked() -> bool:
    """`install()` where EXPERTLINK_DEEP_EP=1. vLLM calls this in each of its processes.

    Returns:
        Whether it was asked for.

    Raises:
        OtherDeepEPError: there is another `deep_ep`.
    """
    asked = DEEP_EP.read()
    if asked:
        install()
    return bool(asked)


def _alias(name: str, source: ModuleType) -> None:
    """A module of that name with everything that `source` has."""
    spec = importlib.machinery.ModuleSpec(
        name, _Loader(), origin=source.__file__, is_package=hasattr(source, "__path__")
    )
    module = importlib.util.module_from_spec(spec)
    own = {key for key in vars(module) if key.startswith("__")}
    vars(module).update({key: value for key, value in vars(source).items() if key not in own})
    module.__doc__, module.__file__ = source.__doc__, source.__file__
    setattr(module, _MARK, True)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
