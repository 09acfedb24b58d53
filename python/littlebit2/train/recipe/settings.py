"""The choices of the recipe, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from littlebit2.train.latents import MAGNITUDE
from littlebit2.train.model import Dense
from littlebit2.train.surrogate import Surrogate, check_surrogate

__all__ = ["DEFAULT_BLOCK", "Precision", "Recipe"]

#: Tokens per sequence where the model can take that many.
DEFAULT_BLOCK = 2048

Precision = Literal["float32", "bfloat16", "float16"]

#: Settings that may differ between a run and its continuation: they change no result.
_WITHOUT_EFFECT = ("eval_batch_size", "keep_work", "quiet", "tensorboard", "save_steps", "stop_after")


@dataclass(frozen=True)
class Recipe:
    """Settings for training. Defaults are from the papers (LittleBit, arXiv 2506.13771) where they give one.

    Attributes:
        block: T, tokens per sequence; ``None``, the default, is 2048 or what the model can take, whichever
            is less (:meth:`sized`).
        steps: optimizer steps; ``None`` takes them from ``epochs``.
        epochs: passes over the training data, where ``steps`` is not given.
        batch_size: sequences per batch and process.
        accumulation: batches per optimizer step.
        lr: peak learning rate of the latents.
        scale_lr: peak learning rate of scales and biases in packed layers; ``None`` takes ``lr``.
        dense_lr: peak learning rate of parameters outside packed layers; ``None`` takes ``lr``.
        warmup: share of the steps in which the rate rises from 0, before it falls to 0 as a cosine.
        weight_decay: for dense matrices; latents, scales and vectors have none.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        hidden_weight: lambda of the loss ``KL + lambda * sum of hidden-state MSE``; 0 turns it off.
        surrogate: derivative used for the sign in backward, ``"smooth-sign"`` or ``"clipped"``.
        magnitude: start value of a latent with confidence 1, see :mod:`littlebit2.train.latents`.
        dense: which parameters outside the packed layers are trained: ``"all"``, ``"norms"``, ``"none"``.
        precision: dtype of matrix products; parameters and optimizer state are float32.
        teacher_precision: dtype of the teacher; ``None`` keeps that of its checkpoint.
        teacher_top_k: run the teacher once before training and keep its k likeliest tokens; no
            hidden-state loss then, and no teacher in memory while training.
        gradient_checkpointing: recompute activations in backward.
        fsdp: shard parameters, gradients and optimizer over the processes of ``torchrun``.
        max_tokens: read at most so many tokens of training text.
        hold_out: share of the blocks, taken from the end, that is held out where no evaluation text is given.
        log_steps: steps between log entries.
        eval_steps: steps between evaluations on held-out text; 0: only before and after training.
        save_steps: steps between checkpoints, a multiple of ``log_steps``.
        eval_batch_size: sequences per batch in evaluation.
        seed: seed for the order of the data and for what the model draws at random.
        deterministic: use deterministic algorithms on GPUs too, which is slower.
        tensorboard: write metrics for TensorBoard.
        keep_work: keep checkpoints and token files after a successful run.
        quiet: no progress bars.
        stop_after: write a checkpoint after this step and return; a later call continues.

    Raises:
        ValueError: a value out of its range, or two that contradict each other.
    """

    block: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 1
    accumulation: int = 1
    lr: float = 4e-5
    scale_lr: float | None = None
    dense_lr: float | None = None
    warmup: float = 0.02
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    hidden_weight: float = 10.0
    surrogate: Surrogate = "smooth-sign"
    magnitude: float = MAGNITUDE
    dense: Dense = "norms"
    precision: Precision = "float32"
    teacher_precision: Precision | None = None
    teacher_top_k: int | None = None
    gradient_checkpointing: bool = False
    fsdp: bool = False
    max_tokens: int | None = None
    hold_out: float = 0.02
    log_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 500
    eval_batch_size: int = 8
    seed: int = 0
    deterministic: bool = False
    tensorboard: bool = True
    keep_work: bool = False
    quiet: bool = False
    stop_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_steps", "save_steps", "eval_batch_size"):
            _check_integer(name, getattr(self, name), 1)
        if self.block is not None:
            _check_integer("block", self.block, 2)
        _check_integer("eval_steps", self.eval_steps, 0)
        _check_integer("seed", self.seed, 0)
        for name in ("steps", "teacher_top_k", "max_tokens", "stop_after"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        for name in ("epochs", "lr", "magnitude"):
            _check_number(name, getattr(self, name), above=0)
        for name in ("scale_lr", "dense_lr"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "max_grad_norm", "hidden_weight"):
            _check_number(name, getattr(self, name), least=0)
        for name in ("warmup", "hold_out"):
            _check_number(name, getattr(self, name), least=0)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        self._check_choices()

    def _check_choices(self) -> None:
        check_surrogate(self.surrogate)
        _check_choice("dense", self.dense, get_args(Dense))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("teacher_precision", self.teacher_precision, (None, *get_args(Precision)))
        for name in ("save_steps", "eval_steps"):
            if getattr(self, name) % self.log_steps:
                raise ValueError(
                    f"{name} must be a multiple of log_steps={self.log_steps}, so that a run that is resumed "
                    f"logs what it would have logged, got {getattr(self, name)}"
                )
        if self.stop_after is not None and self.stop_after % self.log_steps:
            raise ValueError(
                f"stop_after must be a multiple of log_steps={self.log_steps}, got {self.stop_after}"
            )
        if self.teacher_top_k is not None and self.hidden_weight:
            raise ValueError(
                "hidden_weight must be 0 with teacher_top_k, which keeps no hidden states, "
                f"got {self.hidden_weight}"
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that a continuation must share."""
        return {name: value for name, value in vars(self).items() if name not in _WITHOUT_EFFECT}

    def rate(self, kind: str) -> float:
        """Return the peak learning rate of a kind of parameter (:func:`.parameter_kind`)."""
        own = {"latent": self.lr, "scale": self.scale_lr, "dense": self.dense_lr}[kind]
        return self.lr if own is None else own

    def sized(self, most: object) -> Recipe:
        """Return the recipe with its block settled.

        Args:
            most: positions that the model can take; no limit if it is no integer.

        Raises:
            ValueError: ``block`` is more.
        """
        limit = most if isinstance(most, int) else None
        if self.block is None:
            return replace(self, block=DEFAULT_BLOCK if limit is None else min(DEFAULT_BLOCK, limit))
        if limit is not None and self.block > limit:
            raise ValueError(
                f"block must be at most {limit}, the teacher's max_position_embeddings, got {self.block}"
            )
        return self

    def total_steps(self, blocks: int, processes: int) -> int:
        """Return the optimizer steps of the run.

        Args:
            blocks: number of training blocks.
            processes: that share each step.

        Raises:
            ValueError: the data does not fill one step.
        """
        per_step = self.batch_size * self.accumulation * processes
        in_epoch = blocks // self.batch_size // processes // self.accumulation
        if in_epoch == 0:
            raise ValueError(
                f"data must fill one step of {per_step} blocks of {self.block} tokens, got {blocks} blocks: "
                "give more text, shorter blocks or a smaller batch"
            )
        return self.steps if self.steps is not None else max(1, math.floor(self.epochs * in_epoch))


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_number(
    name: str, value: object, *, above: float | None = None, least: float | None = None
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if ok and isinstance(value, (int, float)):
        ok = (above is None or value > above) and (least is None or value >= least)
    if not ok:
        wanted = f"above {above}" if above is not None else f"at least {least}"
        raise ValueError(f"{name} must be a finite number {wanted}, got {value!r}")
