"""The recipe on transformers' ``Trainer``: from a dense model and text to a packed checkpoint.

Names are imported on first use: :func:`evaluate_model` needs transformers alone, training also accelerate.
"""

from typing import TYPE_CHECKING

from littlebit2._lazy import import_on_use

if TYPE_CHECKING:
    from .evaluation import Evaluation, evaluate_model
    from .run import FinetuneReport, finetune
    from .settings import Recipe
    from .trainer import DistillationTrainer

__all__ = [
    "DistillationTrainer",
    "Evaluation",
    "FinetuneReport",
    "Recipe",
    "evaluate_model",
    "finetune",
]

#: The module that defines each public name.
_HOMES = {
    "DistillationTrainer": ".trainer",
    "Evaluation": ".evaluation",
    "FinetuneReport": ".run",
    "Recipe": ".settings",
    "evaluate_model": ".evaluation",
    "finetune": ".run",
}


__getattr__, __dir__ = import_on_use(globals(), _HOMES)
