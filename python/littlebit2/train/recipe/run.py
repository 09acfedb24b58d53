"""A whole run: quantize, train against the teacher, pack, and check what was written."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from littlebit2._messages import hub_hint
from littlebit2.architecture.experts import LittleBitExperts
from littlebit2.architecture.select import DEFAULT_EXCLUDE
from littlebit2.checkpoint import find_side_files
from littlebit2.disk import check_apart, check_replaceable, write_json
from littlebit2.integrations.bars import no_bars_in_logs
from littlebit2.integrations.loading import load
from littlebit2.offline import importance_digest, quantize_checkpoint
from littlebit2.offline.group import Group, process_group
from littlebit2.quantize import Importance, QuantConfig
from littlebit2.quantize.device import check_device
from littlebit2.train.data import TokenBlocks, TokenFile, find_files, read_texts, write_tokens
from littlebit2.train.model import trainable_layers
from littlebit2.train.perplexity import perplexity
from littlebit2.train.teacher import LiveTeacher, StoredTeacher, Teacher, check_logits, store_teacher

from .checkpoints import latest_checkpoint, remove_incomplete
from .evaluation import load_tokenizer
from .progress import Progress
from .settings import Recipe
from .student import build_student, check_dense, check_export, check_start, export_student, round_dense
from .trainer import DistillationTrainer, MetricsLog, StopAfter
from .work import FinetuneDirectory, describe_files

__all__ = ["REPORT_NAME", "FinetuneReport", "finetune"]

#: Beside the weights: settings, perplexities and every entry of the metrics.
REPORT_NAME = "finetune.json"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        out: the packed checkpoint, or ``None`` if the call ended before the last step (``stop_after``).
        steps: that are done.
        bpw: counted bits per weight of the packed layers.
        perplexity: on the held-out text: ``teacher`` (without for a stored one), ``start``, ``trained`` (in
            the precision of training), ``packed`` (the checkpoint on the packed kernels, float32).
        agreement: largest relative difference of logits, trained against packed; ``None`` if sharded.
        seconds: duration of this call.
        history: all entries of the metrics.
    """

    out: Path | None
    steps: int
    bpw: float
    perplexity: dict[str, float]
    agreement: float | None
    seconds: float
    history: list[dict[str, Any]]


def finetune(
    teacher: str | Path,
    out: str | Path,
    data: str | Path | Sequence[str | Path],
    config: QuantConfig | None = None,
    *,
    start: str | Path | None = None,
    recipe: Recipe | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    text_field: str = "text",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    importance: Mapping[str, Importance] | None = None,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
) -> FinetuneReport:
    """Train a packed model to do what a dense one does (LittleBit, arXiv 2506.13771, distillation).

    The dense model is quantized (or a packed checkpoint taken), its signs become float latents, these are
    trained against the dense model, and the result is packed again, evaluated as it was written, and
    compared with what was trained. Everything the run needs lies in ``<out>.finetune``: killed at any
    moment, the same call continues from the last whole checkpoint and logs the losses that it would have
    logged. When ``out`` is written, that folder keeps the TensorBoard files alone.

    Under ``torchrun`` the processes share every step; ``recipe.fsdp`` shards the model over them too.

    Args:
        teacher: directory of a dense checkpoint with a tokenizer.
        out: directory to make.
        data: files or directories of text, JSON lines, Parquet or Arrow (:func:`.find_files`).
        config: how to quantize; all methods. Either this or ``start``.
        start: a packed checkpoint of the same model, in any layout that is read.
        recipe: how to train.
        eval_data: held-out text; by default the last blocks of ``data`` (``recipe.hold_out``).
        text_field: name of the text in JSON lines and tables.
        include: patterns of modules to quantize, as of :func:`.quantize_checkpoint`.
        exclude: likewise.
        importance: weighs errors while the start is quantized, as of :func:`.quantize_checkpoint`.
        device: ``"cpu"`` or ``"cuda"``.
        resume: continue an interrupted run; otherwise it is discarded.
        overwrite: whether ``out`` may be a checkpoint, which is replaced at the end.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced.
        FileNotFoundError: a directory or data file is not there.
        RunError: the folder of the run is in use, of other settings or somebody else's; or a loss is not
            finite.
        ImportError: TensorBoard or pyarrow is needed and not installed.
        ValueError: any other argument that cannot be, such as an ``out`` that does not lie apart from the
            models; the message names it.
    """
    began = time.perf_counter()
    recipe = (recipe or Recipe()).sized(check_dense(Path(teacher)).get("max_position_embeddings"))
    if (config is None) == (start is None):
        raise ValueError(
            "either config or start must be given, got " + ("none" if config is None else "both")
        )
    if recipe.tensorboard and find_spec("tensorboard") is None:
        raise ImportError(
            "metrics need tensorboard, which is not installed: pip install 'littlebit2-kernels[train]', or "
            "do without (--no-tensorboard)"
        )
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    check_device(device)
    target = Path(os.path.abspath(out))
    run = _Run(
        teacher=Path(teacher),
        out=target,
        files=find_files(data),
        eval_files=None if eval_data is None else find_files(eval_data),
        config=config,
        start=None if start is None else Path(start),
        recipe=recipe,
        text_field=text_field,
        patterns=(include, exclude),
        importance=importance,
        device=device,
        overwrite=overwrite,
        work=FinetuneDirectory(target),
    )
    run.check()
    with _processes(device, recipe) as group:
        try:
            group.from_leader(lambda: run.work.open(run.settings(), resume=resume))
            return replace(run.go(group), seconds=time.perf_counter() - began)
        finally:
            run.work.close()


@contextmanager
def _processes(device: str, recipe: Recipe) -> Any:
    """Start what ``torchrun`` asks for, in the way that the ``Trainer`` expects it; end it afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        if recipe.fsdp:
            raise ValueError("fsdp must be used with several processes: torchrun --nproc-per-node N ...")
        yield Group()
        return
    state = PartialState(cpu=device == "cpu")
    try:
        with process_group() as group:
            yield group
    finally:
        state.destroy_process_group()


@dataclass(frozen=True)
class _Run:
    """The arguments of one run, and its steps."""

    teacher: Path
    out: Path
    files: list[Path]
    eval_files: list[Path] | None
    config: QuantConfig | None
    start: Path | None
    recipe: Recipe
    text_field: str
    patterns: tuple[str | Sequence[str], str | Sequence[str]]
    importance: Mapping[str, Importance] | None
    device: str
    overwrite: bool
    work: FinetuneDirectory

    def check(self) -> None:
        """Raise what can be told before anything is computed."""
        check_apart(self.out, self.work.path, teacher=self.teacher)
        if self.start is not None:
            # The result may take the place of its start, which stays until then.
            replaced = self.out.resolve() == self.start.resolve()
            check_apart(*(() if replaced else (self.out,)), self.work.path, start=self.start)
        replaces = find_side_files(self.teacher).copied
        check_replaceable(self.out, overwrite=self.overwrite, replaces=replaces)
        if self.start is not None and not self.start.is_dir():
            raise FileNotFoundError(
                f"start must be a checkpoint directory, got {self.start}, which is none{hub_hint(self.start)}"
            )
        if self.start is not None:
            check_start(self.start)
        load_tokenizer(self.teacher, "teacher")

    def settings(self) -> dict[str, Any]:
        """Return what a continuation must share with this run."""
        weights = [
            *self.teacher.glob("*.safetensors"),
            *self.teacher.glob("*.bin"),
            self.teacher / "config.json",
        ]
        start = None if self.start is None else describe_files(sorted(self.start.glob("*.safetensors")))
        return {
            **self.recipe.fingerprint,
            "teacher": describe_files(sorted(weights)),
            "data": describe_files(self.files),
            "eval_data": None if self.eval_files is None else describe_files(self.eval_files),
            "text_field": self.text_field,
            "quantization": None
            if self.config is None
            else {k: str(v) for k, v in vars(self.config).items()},
            "start": start,
            **({} if self.importance is None else {"importance": importance_digest(self.importance)}),
            "patterns": [list([p] if isinstance(p, str) else p) for p in self.patterns],
            "device": self.device,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }

    def go(self, group: Group) -> FinetuneReport:
        train, held_out = self.blocks(group)
        steps = self.recipe.total_steps(len(train), group.size)
        start = self.start_checkpoint()
        student = build_student(self.teacher, start, self.recipe)
        check_logits(student, "teacher")
        bpw = _bits_per_weight(student)
        checkpoint = latest_checkpoint(self.work.checkpoints)
        group.together(lambda: remove_incomplete(self.work.checkpoints) if group.leads else None)
        trainer = self.trainer(
            group, student, self.teacher_of(group, train), train, held_out, steps, checkpoint
        )
        found: dict[str, float] = {}
        if held_out is not None and isinstance(trainer.teacher, LiveTeacher):
            trainer._place_teacher()
            found["teacher"] = trainer.perplexity(trainer.teacher.model, held_out).value
        done = _step_of(checkpoint)
        if done >= steps:
            assert checkpoint is not None  # it has steps
            trainer.restore(checkpoint, steps)
        else:
            with no_bars_in_logs():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history = trainer.state.log_history
        measured = [entry["eval_perplexity"] for entry in history if "eval_perplexity" in entry]
        if measured:
            found["start"] = measured[0]
        if trainer.state.global_step < steps:
            return FinetuneReport(None, trainer.state.global_step, bpw, found, None, 0.0, history)
        if held_out is not None:
            found["trained"] = trainer.perplexity(trainer.model, held_out).value
        packed, agreement = self.export(group, trainer, held_out or train, held_out)
        if packed is not None:
            found["packed"] = packed
        report = FinetuneReport(self.out, steps, bpw, found, agreement, 0.0, history)
        group.from_leader(lambda: self.finish(report))
        return report

    def blocks(self, group: Group) -> tuple[TokenBlocks, TokenBlocks | None]:
        """Return training and held-out blocks, tokenized by the first process."""

        def write() -> None:
            tokenizer = load_tokenizer(self.teacher)
            for split, files, most in (
                ("train", self.files, self.recipe.max_tokens),
                ("eval", self.eval_files, None),
            ):
                path = self.work.tokens(split)
                if files is not None and TokenFile.open(path) is None:
                    write_tokens(path, read_texts(files, self.text_field), tokenizer, max_tokens=most)

        group.from_leader(write)
        tokens = TokenFile.open(self.work.tokens("train"))
        assert tokens is not None  # just written
        length = self.recipe.block
        assert length is not None  # settled by Recipe.sized
        everything = TokenBlocks(tokens, length)
        if self.eval_files is not None:
            held = TokenFile.open(self.work.tokens("eval"))
            assert held is not None  # just written
            return everything, TokenBlocks(held, length)
        count = math.ceil(self.recipe.hold_out * everything.total)
        if count == 0:
            return everything, None
        if count >= everything.total:
            raise ValueError(
                f"data must hold training blocks beside the {count} held out, got {everything.total} blocks "
                f"of {length} tokens: give more text, shorter blocks, or hold_out=0"
            )
        cut = everything.total - count
        return TokenBlocks(tokens, length, 0, cut), TokenBlocks(tokens, length, cut)

    def start_checkpoint(self) -> Path:
        """Return the packed checkpoint to start from, made where it has to be."""
        if self.config is None:
            assert self.start is not None  # one of the two is given
            return self.start
        include, exclude = self.patterns
        quantize_checkpoint(
            self.teacher,
            self.work.start,
            self.config,
            include=include,
            exclude=exclude,
            importance=self.importance,
            device=self.device,
            progress=not self.recipe.quiet,
        )
        return self.work.start

    def teacher_of(self, group: Group, train: TokenBlocks) -> Teacher:
        """Return the teacher: beside the student, or stored."""
        precision = self.recipe.teacher_precision
        dtype = None if precision is None else _DTYPES[precision]
        k = self.recipe.teacher_top_k
        if k is None:
            return LiveTeacher(load(self.teacher, dtype=dtype))

        def store() -> None:
            model = load(self.teacher, dtype=dtype, device=self.device)
            hidden = True if self.recipe.quiet else None  # None: where stderr is no terminal
            with tqdm(total=len(train), desc="teacher", unit="block", disable=hidden) as bar:
                store_teacher(
                    model,
                    train,
                    self.work.teacher,
                    k=k,
                    batch_size=self.recipe.batch_size,
                    progress=lambda done, _: bar.update(done - bar.n),
                )

        group.from_leader(store)
        return StoredTeacher(self.work.teacher)

    def trainer(
        self,
        group: Group,
        student: Any,
        teacher: Teacher,
        train: TokenBlocks,
        held_out: TokenBlocks | None,
        steps: int,
        checkpoint: Path | None,
    ) -> DistillationTrainer:
        """Return the ``Trainer`` of the run."""
        recipe = self.recipe
        callbacks: list[TrainerCallback] = []
        if recipe.tensorboard:
            callbacks.append(MetricsLog(self.work.logs, _step_of(checkpoint)))
        if recipe.stop_after is not None:
            callbacks.append(StopAfter(recipe.stop_after))
        if not recipe.quiet:
            callbacks.append(Progress())
        trainer = DistillationTrainer(
            student,
            self.arguments(
                group,
                steps,
                evaluates=held_out is not None,
                resumes=checkpoint is not None,
                # Experts that no token of a batch is routed to have no gradients.
                some_unused=any(isinstance(module, LittleBitExperts) for module in student.modules()),
            ),
            teacher,
            train,
            held_out,
            hidden_weight=recipe.hidden_weight,
            rate=recipe.rate,
            callbacks=callbacks,
        )
        if recipe.fsdp and not trainer.is_fsdp_enabled:
            raise ValueError(
                f"fsdp must be used on devices that accelerate shards over, got {self.device}: it would "
                "train copies instead; leave --fsdp out"
            )
        # They write to stdout.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def arguments(
        self, group: Group, steps: int, *, evaluates: bool, resumes: bool, some_unused: bool
    ) -> TrainingArguments:
        """Return the recipe in the terms of the ``Trainer``."""
        recipe = self.recipe
        sharded: dict[str, Any] = {}
        if recipe.fsdp:
            # Every process writes its part of a checkpoint.
            config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
            sharded = {"fsdp": True, "fsdp_config": config}
        return TrainingArguments(
            output_dir=str(self.work.checkpoints),
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.eval_batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            learning_rate=recipe.lr,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(recipe.warmup * steps),
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_grad_norm,
            optim="adamw_torch",
            bf16=recipe.precision == "bfloat16",
            fp16=recipe.precision == "float16",
            seed=recipe.seed,
            full_determinism=recipe.deterministic,
            logging_strategy="steps",
            logging_steps=recipe.log_steps,
            save_strategy="steps",
            save_steps=recipe.save_steps,
            # The one before is only given up once the next is whole.
            save_total_limit=2,
            eval_strategy="steps" if evaluates and recipe.eval_steps else "no",
            eval_steps=recipe.eval_steps if evaluates and recipe.eval_steps else None,
            eval_on_start=evaluates and not resumes,
            report_to=[],
            disable_tqdm=True,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=some_unused if group.size > 1 else None,
            use_cpu=self.device == "cpu",
            **sharded,
        )

    def export(
        self, group: Group, trainer: DistillationTrainer, sample: TokenBlocks, held_out: TokenBlocks | None
    ) -> tuple[float | None, float | None]:
        """Write the packed checkpoint; return its perplexity and its agreement with the student."""
        dtype = _stored_dtype(self.teacher)
        model: Any = trainer.model
        state = _whole_state(model) if self.recipe.fsdp else None

        def write() -> tuple[float | None, float | None]:
            if state is None:
                round_dense(model, dtype)
            export_student(model, self.out, self.teacher, dtype, state=state, overwrite=self.overwrite)
            packed = load(self.out, dtype=torch.float32, activation="exact", device=self.device)
            ids = sample[0]["input_ids"].unsqueeze(0)
            agreement = None
            if state is None:
                plain = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                agreement = check_export(plain, packed, ids)
            if held_out is None:
                return None, agreement
            return perplexity(packed, held_out, batch_size=self.recipe.eval_batch_size).value, agreement

        return group.from_leader(write)

    def finish(self, report: FinetuneReport) -> None:
        """Write the report beside the weights and clear the folder of the run."""
        entry = {
            "recipe": vars(self.recipe),
            "quantization": None
            if self.config is None
            else {k: _plain(v) for k, v in vars(self.config).items()},
            **{k: v for k, v in asdict(report).items() if k not in ("out", "seconds")},
        }
        write_json(self.out / REPORT_NAME, entry)
        if not self.recipe.keep_work:
            self.work.clear(self.work.logs)
            self.work.remove_if_empty()


def _whole_state(model: Any) -> dict[str, torch.Tensor]:
    """Gather the state of a sharded model in the first process; all take part."""
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415  # not in every build of torch
        StateDictOptions,
        get_model_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options)
    return dict(state)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, tuple, type(None))) else str(value)


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _stored_dtype(teacher: Path) -> torch.dtype:
    name = str(check_dense(teacher).get("dtype") or check_dense(teacher).get("torch_dtype") or "float32")
    return _DTYPES.get(name.removeprefix("torch."), torch.float32)


def _bits_per_weight(model: Any) -> float:
    shapes = [layer.shape for layer in trainable_layers(model).values()]
    weights = sum(shape.in_features * shape.out_features for shape in shapes)
    return sum(shape.counted_bits for shape in shapes) / weights
