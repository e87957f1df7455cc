"""The cache that every graph of one model shares, in the hands of the caller."""

from __future__ import annotations

from zsmerge_compile.cache import Cache
from zsmerge_compile.program import Program


class ModelCache(Cache):
    """What `zsmerge_compile.new_cache` returns: a `Cache` that knows the model it is for.

    program  the model as it was traced for this cache: its attention sites, layouts and policy
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.interface())
        self.program = program
