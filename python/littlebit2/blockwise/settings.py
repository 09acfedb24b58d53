"""How a model is quantized block by block, validated once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .tuning.precision import Precision, check_precision

__all__ = ["BlockwiseSettings"]


@dataclass(frozen=True)
class BlockwiseSettings:
    """Text, steps and rates of the block-by-block method.

    Attributes:
        length: T, tokens per sequence; fewer where the model takes fewer.
        samples: sequences for statistics and tuning.
        held_out: further sequences, on which states are compared and the perplexity is measured.
        batch_size: sequences per tuning step.
        steps: tuning steps per block; 0 disables tuning.
        lr: peak learning rate for latents.
        scale_lr: peak learning rate for scales, norms and biases, relative to the root mean square of each.
        warmup: share of the steps during which the rates rise; afterwards they follow a cosine.
        evaluations: comparisons on the held-out sequences during the tuning of a block.
        patience: comparisons without a gain after which tuning stops.
        importance_samples: sequences for the importance of inputs.
        sensitivity: share of a block's loss that is weighted by what the model's output feels of an error
            (:mod:`.tuning.sensitivity`), in [0, 1]; the rest is the plain squared error.
        sensitivity_samples: sequences for the sensitivity.
        kl_samples: sequences on which ranks are tried, with budget ``"kl"`` (:mod:`.ranking`).
        kl_length: tokens of each of them, from its start; at most T.
        kl_sizes: ranks that are tried, relative to the uniform ones; they are rounded to multiples of 8.
        precision: dtype of matrix products in tuning and distillation (:mod:`.tuning.precision`). Hidden
            states between blocks, and all measurements, are float32.
        distill_steps: steps of the whole model's distillation at the end; 0 disables it. Of a few steps
            (:data:`.SIGNS_FROM`) scales, norms and biases take part, at twice their rate, and latents do not.
        distill_minutes: time for the distillation (0: none), instead of ``distill_steps``; see
            :func:`.fitting_steps`.
        distill_samples: sequences for the distillation, drawn anew.
        distill_lr: peak learning rate for latents in the distillation.
        distill_scale_lr: peak learning rate for scales, norms and biases in it, relative as above.
        distill_batch_size: sequences per distillation step.
        minutes: instead of ``samples``, ``steps`` and ``distill_steps``: time for everything, see
            :mod:`.tuning.minutes`. The distillation gets ``distill_minutes`` of it, or a fixed share.
        seed: seed for the choice and order of sequences.

    Raises:
        ValueError: a value is out of its range.
    """

    length: int = 256
    samples: int = 256
    held_out: int = 8
    batch_size: int = 2
    steps: int = 200
    lr: float = 1e-3
    scale_lr: float = 3e-3
    warmup: float = 0.1
    evaluations: int = 4
    patience: int = 3
    importance_samples: int = 32
    sensitivity: float = 0.7
    sensitivity_samples: int = 4
    kl_samples: int = 3
    kl_length: int = 128
    kl_sizes: tuple[float, ...] = (0.6, 1.6)
    precision: Precision = "auto"
    distill_steps: int = 0
    distill_minutes: float | None = None
    distill_samples: int = 4096
    distill_lr: float = 4e-5
    distill_scale_lr: float = 5e-3
    distill_batch_size: int = 4
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            **dict.fromkeys(("samples", "held_out", "batch_size", "evaluations", "patience"), 1),
            **dict.fromkeys(("importance_samples", "sensitivity_samples"), 1),
            **dict.fromkeys(("distill_samples", "distill_batch_size", "kl_samples"), 1),
            **dict.fromkeys(("steps", "distill_steps", "seed"), 0),
            **dict.fromkeys(("length", "kl_length"), 2),
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
        for name in ("lr", "scale_lr", "distill_lr", "distill_scale_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes!r}")
        if self.distill_minutes is not None:
            if not self.distill_minutes >= 0:
                raise ValueError(f"distill_minutes must not be negative, got {self.distill_minutes!r}")
            if self.distill_steps:
                raise ValueError(
                    "distill_minutes chooses distill_steps, got both "
                    f"({self.distill_minutes!r} and {self.distill_steps!r})"
                )
            if self.minutes is not None and not self.distill_minutes < self.minutes:
                raise ValueError(
                    f"distill_minutes must be less than minutes={self.minutes!r}, "
                    f"got {self.distill_minutes!r}"
                )
        if not self.kl_sizes or not all(size > 0 for size in self.kl_sizes):
            raise ValueError(f"kl_sizes must hold positive numbers, got {self.kl_sizes!r}")
        if not 0 <= self.sensitivity <= 1:
            raise ValueError(f"sensitivity must be in [0, 1], got {self.sensitivity!r}")
        check_precision(self.precision)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup!r}")

    @property
    def distills(self) -> bool:
        """Whether the whole model is distilled at the end."""
        if self.distill_minutes is not None:
            return self.distill_minutes > 0
        return self.distill_steps > 0 or self.minutes is not None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values by name."""
        return {**asdict(self), "kl_sizes": list(self.kl_sizes)}
