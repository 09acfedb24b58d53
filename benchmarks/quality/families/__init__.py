"""Every model family of transformers: what quantizes, loads and computes the same as its dense model.

For each model type a tiny configuration is made by shrinking whatever sizes it has. The model is saved,
quantized from its files and in memory, loaded, saved and loaded again, and compared with the dense model
whose weights are those that the packed layers stand for.
"""

from .classes import classes_of, model_types
from .compare import dequantized
from .runner import SECONDS, sweep, try_apart
from .table import markdown
from .trial import FAILED, KINDS, NOT_BUILT, REFUSED, WORKS, Outcome

__all__ = [
    "FAILED",
    "KINDS",
    "NOT_BUILT",
    "REFUSED",
    "SECONDS",
    "WORKS",
    "Outcome",
    "classes_of",
    "dequantized",
    "markdown",
    "model_types",
    "sweep",
    "try_apart",
]
