"""What callers import from `deep_ep.utils.event`."""

from expertlink.compat.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
