"""The recipe on transformers' ``Trainer``: from a dense model and text to a packed checkpoint.

Names are imported on first use: :func:`evaluate_model` needs transformers alone, training also accelerate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate_model
    from .run import FinetuneReport, finetune
    from .settings import FinetuneError, Recipe
    from .trainer import DistillationTrainer

__all__ = [
    "DistillationTrainer",
    "Evaluation",
    "FinetuneError",
    "FinetuneReport",
    "Recipe",
    "evaluate_model",
    "finetune",
]

#: The module that defines each public name.
_HOMES = {
    "DistillationTrainer": ".trainer",
    "Evaluation": ".evaluation",
    "FinetuneError": ".settings",
    "FinetuneReport": ".run",
    "Recipe": ".settings",
    "evaluate_model": ".evaluation",
    "finetune": ".run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
