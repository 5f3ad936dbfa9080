"""Recipes: tables of typed, checked keys, read from TOML, changed by `--set`."""
