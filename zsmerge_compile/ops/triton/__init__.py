"""Triton kernels of the cache ops, for CUDA.

`supports` tells whether a layer's shape can be served and imports no triton. `ops` registers `zsmerge_triton::decode`
and `zsmerge_triton::extend`, which take what `zsmerge::decode` and `zsmerge::extend` take; importing it needs triton.
Under TRITON_INTERPRET=1, set before triton is first imported, the kernels run on CPU tensors: that is how they are
tested without a GPU.
"""
