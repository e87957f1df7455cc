"""Backends: each makes callables of a program's two graphs. `lower(name, program)` is the only door."""
