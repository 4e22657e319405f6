"""Movers of rows behind one contract (`base.Engine`); `select` picks one."""
