"""Kernels compiled at run time: no compiler on the machine, no build step."""
