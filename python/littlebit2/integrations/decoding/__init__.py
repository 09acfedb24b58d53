"""Decoding step by step: a cache of fixed size, and steps that can be captured."""

from .static import STEPS, StaticDecoder

__all__ = ["STEPS", "StaticDecoder"]
