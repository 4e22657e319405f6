"""SGLang's plug-in: the drop-in for `deep_ep`, also where SGLang has looked for that already.

An entry point of the group `sglang.srt.plugins`, which SGLang calls in each of its processes. It
does nothing unless EXPERTLINK_DEEP_EP=1. By then SGLang has imported its dispatchers, which try to
import `deep_ep` when they are imported themselves, and remember that it was not there. So they are
given what they did not find. Tested with the dispatcher modules of SGLang 0.5.23.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import NamedTuple

from expertlink.compat.deep_ep.installing import install_if_asked
from expertlink.integrations.versions import FrameworkVersionError, require

SINCE, BEFORE = "0.5.23", "0.5.24"
QUANTIZER = "sglang_per_token_group_quant_fp8"
QUANTIZER_MODULE = "sglang.kernels.ops.quantization.fp8_kernel"


class Dispatcher(NamedTuple):
    """A module of SGLang that imports `deep_ep` when it is imported.

    Attributes:
        module: its name.
        found: name of its variable that says whether that worked.
        error: name of its variable that holds why not.
        names: what it imports from `deep_ep`.
    """

    module: str
    found: str
    error: str
    names: tuple[str, ...]


_FOLDER = "sglang.srt.layers.moe.token_dispatcher"
DISPATCHERS = (
    Dispatcher(f"{_FOLDER}.deepep", "use_deepep", "_deepep_import_error", ("Buffer", "Config")),
    Dispatcher(
        f"{_FOLDER}.deepep_v2", "use_deepep_v2", "_deepep_v2_import_error", ("ElasticBuffer",)
    ),
)


def plugin() -> None:
    """Installs the drop-in where EXPERTLINK_DEEP_EP=1. Local; safe to repeat.

    Raises:
        OtherDeepEPError: there is another `deep_ep`.
        FrameworkVersionError: SGLang looked for `deep_ep` before, in a way that is not known.
    """
    if not install_if_asked():
        return
    for dispatcher in DISPATCHERS:
        module = sys.modules.get(dispatcher.module)
        if module is None or getattr(module, dispatcher.found, None) is True:
            continue  # it will find the drop-in, or has found it
        require("sglang", since=SINCE, before=BEFORE)
        _give(dispatcher, module)


def _give(dispatcher: Dispatcher, module: ModuleType) -> None:
    """Does what the module's own import of `deep_ep` would have done."""
    missing = [n for n in (dispatcher.found, dispatcher.error) if not hasattr(module, n)]
    if missing:
        raise FrameworkVersionError(
            f"{dispatcher.module} has no {' and no '.join(missing)}: this SGLang looks for deep_ep "
            "in a way that expertlink does not know; run what it starts through "
            "`python -m expertlink.compat.deep_ep`"
        )
    try:
        quantizer = getattr(importlib.import_module(QUANTIZER_MODULE), QUANTIZER)
    except Exception as error:  # SGLang says it when the dispatcher is used
        setattr(module, dispatcher.error, error)
        return
    deep_ep = sys.modules["deep_ep"]
    for name in dispatcher.names:
        setattr(module, name, getattr(deep_ep, name))
    setattr(module, QUANTIZER, quantizer)
    setattr(module, dispatcher.error, None)
    setattr(module, dispatcher.found, True)
