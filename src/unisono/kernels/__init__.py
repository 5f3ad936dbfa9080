"""Compiled routines, each beside its reference in operations of torch or NumPy, declared in its module."""
