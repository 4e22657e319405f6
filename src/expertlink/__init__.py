"""Expert-parallel communication for Mixture-of-Experts models on PyTorch.

`dispatch` sends every token to the ranks that hold its top-k experts, `combine` brings the weighted
expert outputs back. Start at `MoECommunicator`.
"""

from expertlink.about import __version__
from expertlink.communicator import MoECommunicator
from expertlink.config import MoECommunicatorConfig
from expertlink.errors import (
    AbortError,
    CapacityError,
    ClosedError,
    ConfigurationError,
    EngineUnavailableError,
    ExpertlinkError,
    HandleError,
    InputError,
    NotPicklableError,
    PeerError,
    PeerTimeoutError,
    RoutingChangedError,
    TooManyTokensError,
)
from expertlink.requests import CombineRequest, DispatchRequest
from expertlink.types import (
    BlockFormat,
    CallStatistics,
    CommOverlapConfig,
    DispatchBuffers,
    DispatchHandle,
    DispatchLayout,
    DispatchOutput,
    QuantScales,
)

__all__ = [
    "AbortError",
    "BlockFormat",
    "CallStatistics",
    "CapacityError",
    "ClosedError",
    "CombineRequest",
    "CommOverlapConfig",
    "ConfigurationError",
    "DispatchBuffers",
    "DispatchHandle",
    "DispatchLayout",
    "DispatchOutput",
    "DispatchRequest",
    "EngineUnavailableError",
    "ExpertlinkError",
    "HandleError",
    "InputError",
    "MoECommunicator",
    "MoECommunicatorConfig",
    "NotPicklableError",
    "PeerError",
    "PeerTimeoutError",
    "QuantScales",
    "RoutingChangedError",
    "TooManyTokensError",
    "__version__",
]
