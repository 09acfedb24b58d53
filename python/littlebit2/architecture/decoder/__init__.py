"""Decoder layers with few calls: what a class computes is read from its source, and then done in one call."""

from .fused import fuse_modules, unfuse_modules

__all__ = ["fuse_modules", "unfuse_modules"]
