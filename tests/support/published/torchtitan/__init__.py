"""Stands for torchtitan where it is not installed: what a token dispatcher sees of 0.3.0."""
