"""Decoding step by step: how to, the caches, steps that can be captured, and the choice of tokens."""

from . import step as step  # gives the attention implementation its step
from .growing import GrowingDecoder
from .static import STEPS, StaticDecoder
from .ways import CACHES, LOOPS, Way, choose_way

__all__ = ["CACHES", "LOOPS", "STEPS", "GrowingDecoder", "StaticDecoder", "Way", "choose_way"]
