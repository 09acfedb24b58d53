"""The parts of `demo`: a model quantized, measured beside the dense one, and shown."""
