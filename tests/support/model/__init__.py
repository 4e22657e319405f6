"""The device protocol of the nvlink engine as state machines; docs/model.md says what they hold."""
