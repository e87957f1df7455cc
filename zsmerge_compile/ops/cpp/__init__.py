"""C++ kernels for the CPU: each reads K and V once, at the speed of the memory.

`build` compiles `source/` at first use and loads it, which registers the operators with PyTorch's dispatcher;
`fakes` has their shapes; `decode` and `extend` are the two cache ops that use them. Importing this package compiles
nothing.
"""
