"""A drop-in for the module `deep_ep`: its interface, on top of communicators.

Import it under its own name, or call `install()` and let other code import `deep_ep`. Neither needs
a GPU or compiles anything. See docs/guide/deep_ep.md.
"""

import torch

from expertlink.compat.deep_ep import utils
from expertlink.compat.deep_ep.buffer import Buffer
from expertlink.compat.deep_ep.config import Config
from expertlink.compat.deep_ep.elastic import ElasticBuffer
from expertlink.compat.deep_ep.elastic_handle import EPHandle
from expertlink.compat.deep_ep.events import EventHandle, EventOverlap
from expertlink.compat.deep_ep.installing import OtherDeepEPError, install, install_if_asked
from expertlink.compat.deep_ep.topology import get_logical_domain_size, get_physical_domain_size

__version__ = "2.1.0"
"""The version of DeepEP whose interface this is."""

topk_idx_t = torch.int64
"""dtype of ids of experts; int32 is taken as well."""

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "OtherDeepEPError",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "install",
    "install_if_asked",
    "topk_idx_t",
    "utils",
]
