"""What a server needs beside a layer's call: parts of layers, stages apart, several layers into one output.

Import order: ``slicing``, ``stages`` and ``operator`` <- ``joined`` <- ``staged``.
"""
