"""Programs and steps that need nvcc or a GPU."""
