"""Machine code of the CUDA kernels, read without a GPU: control bits, and a block's path through it."""
