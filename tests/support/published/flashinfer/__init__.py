"""Stands for flashinfer where it is not installed: its interface of communications, 0.7.2."""
