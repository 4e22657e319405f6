"""The device protocol of the nvlink engine as state machines (docs/protocol/model.md)."""
