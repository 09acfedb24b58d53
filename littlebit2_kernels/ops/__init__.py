"""The operators ``torch.ops.littlebit2.*``: one file per operator, loading, and the calls around them.

Import order: ``operands`` <- ``balance``, ``packed``, ``prepacked``, ``grouped`` (<- ``joined``), ``dense``
<- ``library`` <- ``calls``. The schemas live in ``csrc/torch/library.cpp``.
"""
