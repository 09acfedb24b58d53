"""Triton kernels: portable, visible to ``torch.compile``, for decode and prefill (docs/triton.md).

``plan`` and ``configs`` decide and need no Triton; ``ops`` imports it, and all else, and registers the
operators. The rest of ``littlebit2_kernels`` comes here through ``backend`` once a call is to run
here.
"""
