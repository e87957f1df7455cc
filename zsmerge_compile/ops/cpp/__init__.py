"""C++ kernels for the CPU: each reads K and V once, at the speed of the memory.

`build` compiles `source/` at first use and loads it, which registers the operators with PyTorch's dispatcher;
`fakes` has their shapes; `decode` uses them in a decode step. Importing this package compiles nothing.
"""
