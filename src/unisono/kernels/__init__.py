"""Compiled routines, each beside its reference in operations of torch or NumPy."""
