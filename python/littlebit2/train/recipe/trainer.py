"""transformers' ``Trainer`` with the distillation loss, its metrics, and checkpoints that are whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerState

from littlebit2.disk import RunError
from littlebit2.train.data import TokenBlocks
from littlebit2.train.flips import FlipMeter
from littlebit2.train.losses import token_nll
from littlebit2.train.model import parameter_kind
from littlebit2.train.perplexity import Perplexity
from littlebit2.train.teacher import LiveTeacher, Teacher

from .checkpoints import mark_complete, saving

__all__ = ["DistillationTrainer"]


class DistillationTrainer(Trainer):
    """Trains a model of trainable layers against a teacher.

    The loss is ``KL(logits) + hidden_weight * sum over layers of hidden-state MSE`` (LittleBit, arXiv
    2506.13771). Logged with every entry: both parts, the share of signs that changed since the entry before
    (``flip_rate``) and since the start (``flipped``). A loss or gradient that is not finite ends the run
    before the optimizer has taken it.

    Args:
        model: the student, a causal language model of transformers.
        args: arguments for the ``Trainer``.
        teacher: see :class:`.Teacher`.
        train_blocks: training data.
        eval_blocks: held-out text whose perplexity :meth:`evaluate` measures.
        hidden_weight: 0 without a hidden-state loss.
        rate: peak learning rate by kind of parameter (:func:`.parameter_kind`); default ``args``'s.
        callbacks: callbacks for the ``Trainer``.

    Raises:
        ValueError: ``hidden_weight`` asks for hidden states that the teacher does not have.
    """

    # A mean over the tokens of each batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        teacher: Teacher,
        train_blocks: TokenBlocks,
        eval_blocks: TokenBlocks | None = None,
        *,
        hidden_weight: float = 10.0,
        rate: Callable[[str], float] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if hidden_weight and not teacher.has_hidden:
            raise ValueError(
                f"hidden_weight must be 0 with a teacher without hidden states, got {hidden_weight}"
            )
        # Entries are not to hide what went wrong.
        args.logging_nan_inf_filter = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            callbacks=callbacks,
        )
        self.teacher = teacher
        self.hidden_weight = hidden_weight
        self._rate = rate
        self._parts: dict[str, torch.Tensor] = {}
        self._batches = 0
        self._last_loss: torch.Tensor | None = None
        self._flips: FlipMeter | None = None
        self._teacher_placed = False

    # --- the loss ----------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of one batch, and the student's outputs where they are asked for."""
        self._place_teacher()
        wants_hidden = self.hidden_weight > 0
        out = model(input_ids=inputs["input_ids"], output_hidden_states=wants_hidden, use_cache=False)
        kl, hidden = self.teacher.losses(inputs, out.logits, out.hidden_states if wants_hidden else None)
        loss = kl
        self._add_part("kl", kl)
        if hidden is not None:
            loss = kl + self.hidden_weight * hidden
            self._add_part("hidden_mse", hidden)
        self._batches += 1
        self._last_loss = loss.detach()
        return (loss, out) if return_outputs else loss

    def _add_part(self, name: str, value: torch.Tensor) -> None:
        value = value.detach()
        self._parts[name] = self._parts[name] + value if name in self._parts else value

    def _place_teacher(self) -> None:
        """Bring the teacher to this process's device, sharded as the student is."""
        if self._teacher_placed or not isinstance(self.teacher, LiveTeacher):
            return
        if self.is_fsdp_enabled:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # noqa: PLC0415  # FSDP alone needs it

            self.teacher.model = fsdp2_prepare_model(self.accelerator, self.teacher.model)
        else:
            self.teacher.model.to(self.args.device)
        self._teacher_placed = True

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # After backward and the exchange of gradients, before the optimizer: the last moment at which the
        # parameters are still good. A scaler of float16 gradients skips such steps by itself.
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:
            values = [("loss", self._last_loss), ("norm of the gradients", norm)]
            for name, value in values:
                if value is not None and not bool(torch.isfinite(torch.as_tensor(value)).all()):
                    raise RunError(self._not_finite(name, float(torch.as_tensor(value))))
        return norm

    def _not_finite(self, name: str, value: float) -> str:
        parts = ", ".join(f"{part} {float(total) / self._batches:g}" for part, total in self._parts.items())
        return (
            f"the {name} must be finite, got {value} at step {self.state.global_step + 1} ({parts}, mean "
            f"since the last entry); nothing of this step was applied. A lower learning rate "
            "(--lr), a longer warm-up or float32 may help; the last checkpoint is whole"
        )

    # --- the optimizer -----------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with a group for each kind of parameter."""
        if self.optimizer is None:
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            student: Any = self.model if model is None else model
            for name, parameter in student.named_parameters():
                if parameter.requires_grad:
                    kind = parameter_kind(name)
                    decays = kind == "dense" and parameter.dim() > 1
                    groups.setdefault((kind, decays), []).append(parameter)
            # Latents first: the learning rate that is logged is the first group's.
            order = sorted(groups, key=lambda key: (("latent", "scale", "dense").index(key[0]), key[1]))
            described = [
                {
                    "params": groups[kind, decays],
                    "lr": self.args.learning_rate if self._rate is None else self._rate(kind),
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for kind, decays in order
            ]
            make, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = make(described, **options)
        return self.optimizer

    # --- metrics -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the flips to every entry of the training loss."""
        if "loss" in logs and self._batches:
            for name, total in self._parts.items():
                mean = (total.float() / self._batches).reshape(1).to(self.args.device)
                logs[name] = float(self.accelerator.gather(mean).mean())
            self._parts, self._batches = {}, 0
            counts = torch.tensor([self.flip_meter().read(self._latents())], device=self.args.device)
            recent, total_flips, count = self.accelerator.gather(counts).sum(0).tolist()
            logs["flip_rate"] = recent / max(count, 1)
            logs["flipped"] = total_flips / max(count, 1)
        super().log(logs, start_time)

    def flip_meter(self) -> FlipMeter:
        """Return the meter; the signs at the first call are its start."""
        if self._flips is None:
            self._flips = FlipMeter(self._latents())
        return self._flips

    def _latents(self) -> dict[str, torch.Tensor]:
        model: Any = self.model
        return {n: p for n, p in model.named_parameters() if parameter_kind(n) == "latent"}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure and log the perplexity of held-out text; all processes share the work."""
        blocks = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(blocks, TokenBlocks):
            raise ValueError(f"eval_dataset must be TokenBlocks, got {type(blocks).__name__}")
        found = self.perplexity(self.model, blocks)
        metrics = {f"{metric_key_prefix}_loss": found.nll, f"{metric_key_prefix}_perplexity": found.value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def perplexity(self, model: Any, blocks: TokenBlocks) -> Perplexity:
        """Measure any model on ``blocks``, which the processes share."""
        training = model.training
        model.eval()
        world, size = self.args.world_size, self.args.per_device_eval_batch_size
        total = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        # Every process runs as many batches: those of a sharded model wait for each other.
        batches = -(-len(blocks) // (size * world))
        with torch.no_grad():
            for i in range(batches):
                first = (i * world + self.args.process_index) * size
                picked = [index for index in range(first, first + size) if index < len(blocks)]
                ids = torch.stack([blocks[index]["input_ids"] for index in picked or [0]])
                ids = ids.to(self.args.device)
                logits = model(input_ids=ids, use_cache=False).logits
                if picked:
                    total += token_nll(logits, ids)
        model.train(training)
        count = len(blocks) * (blocks.length - 1)
        return Perplexity(float(self.accelerator.gather(total).sum()) / count, count)

    # --- checkpoints -------------------------------------------------------------------------------------

    def restore(self, checkpoint: Path, steps: int) -> None:
        """Take the weights and metrics of a checkpoint, without training.

        Args:
            checkpoint: whole.
            steps: total steps of the run.
        """
        if self.is_fsdp_enabled:
            self._prepare_for_training(steps, self.get_train_dataloader(), str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = torch.load(self._flips_file(Path(checkpoint)), weights_only=True)
            self.flip_meter().load_state_dict(state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with saving(folder):
            super()._save_checkpoint(model, trial)
            torch.save(self.flip_meter().state_dict(), self._flips_file(folder))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with saving(folder):
                mark_complete(folder)
        self.accelerator.wait_for_everyone()

    def _flips_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"flips-{self.args.process_index}.pt"


class StopAfter(TrainerCallback):
    """Ends the call after a step, with a checkpoint.

    Args:
        step: the last one.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop and save where it is time."""
        if state.global_step >= self.step:
            control.should_save = True
            control.should_training_stop = True
        return control


class MetricsLog(TrainerCallback):
    """Writes every entry to TensorBoard.

    Args:
        folder: where the event files go.
        resumed: step that the run continues from; later entries, from a killed process, are purged.
    """

    def __init__(self, folder: Path, resumed: int = 0) -> None:
        self.folder = folder
        self.resumed = resumed
        self._writer: Any = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write the numbers of one entry."""
        if not state.is_world_process_zero or not logs:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional

            self._writer = SummaryWriter(
                str(self.folder), purge_step=self.resumed + 1 if self.resumed else None
            )
        for name, value in logs.items():
            if isinstance(value, (int, float)):
                group = "eval" if name.startswith("eval_") else "train"
                self._writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)
        self._writer.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
