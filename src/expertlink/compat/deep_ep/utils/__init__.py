"""What callers import from `deep_ep.utils`."""

from expertlink.compat.deep_ep.events import EventHandle, EventOverlap
from expertlink.compat.deep_ep.utils import event

__all__ = ["EventHandle", "EventOverlap", "event"]
