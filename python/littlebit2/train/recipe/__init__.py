"""The recipe on transformers' ``Trainer``: from a dense model and text to a packed checkpoint."""

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
