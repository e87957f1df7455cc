"""`tools/kernels`: what the Triton kernels need of a GPU (`aot`, no GPU needed) and their best block sizes (`tune`)."""
