"""Quantize a causal language model block by block, each block tuned to what the dense one gives."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from littlebit2.architecture.select import DEFAULT_EXCLUDE, KEEP, check_patterns
from littlebit2.checkpoint import DenseCheckpoint, open_dense
from littlebit2.disk import check_apart, check_space
from littlebit2.offline import RunReport
from littlebit2.offline.assemble import assemble
from littlebit2.offline.choice import Choice, choose_layers
from littlebit2.offline.jobs import Job, make_jobs, run_settings
from littlebit2.offline.pipeline import dense_bytes_of, quantize_batch, start_run
from littlebit2.offline.work import work_path
from littlebit2.quantize import QuantConfig
from littlebit2.quantize.device import check_device
from littlebit2.quantize.ranks import needs_spectra
from littlebit2.train.data import find_files
from littlebit2.train.losses import token_nll
from littlebit2.train.magnitudes import LATENTS
from littlebit2.train.perplexity import Perplexity
from littlebit2.train.recipe.work import describe_files

from .check import check_blocks
from .find import find_blocks
from .pieces import ModelInPieces
from .ranking import ranks_by_kl
from .report import BLOCKWISE_NAME, BlockwiseReport
from .settings import BlockwiseSettings
from .states import States
from .text import fitting_length, load_tokenizer, sequences
from .tuning.block import BlockRunner, batches
from .tuning.distill import Distillation
from .tuning.minutes import MOST, PER_STEP, fitting, fitting_steps, is_worth_distilling, seconds_of_blocks
from .tuning.precision import resolve_precision
from .tuning.sensitivity import measure_sensitivity, mixed
from .work import DISTILL_STEPS, KEEP_LATENTS, PRECISION, SAMPLES, STEPS, BlockwiseWork

__all__ = ["quantize_blockwise"]


@dataclass(frozen=True)
class _Plan:
    """What is settled before any work."""

    choice: Choice
    jobs: list[Job]
    blocks: str
    length: int
    dense_bytes: int
    dtypes: Mapping[str, torch.dtype]
    settings: dict[str, Any]
    #: How ranks came about, if they are not uniform, and the seconds that it took.
    allocation: dict[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    #: What of it an earlier process took.
    seconds_before: float = 0.0

    def of_block(self, index: int) -> list[Job]:
        """The layers of a block."""
        prefix = f"{self.blocks}.{index}."
        return [job for job in self.jobs if job.source.module.startswith(prefix)]

    def with_ranks(self, work: BlockwiseWork, runner: BlockRunner, progress: bool) -> _Plan:
        """Settle the ranks by the KL of the model's output."""
        blocks = [self.of_block(index) for index in range(len(runner.pieces))]
        known = work.ranks() is not None
        found = ranks_by_kl(work, runner, blocks, progress=progress)
        return replace(
            self,
            jobs=found.applied(self.jobs),
            allocation=found.entry,
            seconds={"ranks": found.seconds},
            seconds_before=found.seconds if known else 0.0,
        )

    def left(self, seconds: float) -> float:
        """What is left of some time."""
        return seconds - sum(self.seconds.values())

    def outside(self) -> list[Job]:
        """The layers outside the blocks."""
        return [job for job in self.jobs if not job.source.module.startswith(f"{self.blocks}.")]


def quantize_blockwise(
    model_dir: str | Path,
    out: str | Path,
    config: QuantConfig,
    data: Sequence[str | Path],
    settings: BlockwiseSettings | None = None,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    head: str = KEEP,
    embedding: str = KEEP,
    text_field: str = "text",
    threads: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    keep_work: bool = False,
    keep_latents: bool = False,
) -> BlockwiseReport:
    """Quantize a dense causal language model block by block and write a littlebit2 checkpoint.

    For each block in turn: the importance of every layer's inputs is measured on the hidden states that the
    quantized blocks before it give; layers are quantized so weighted; then latents, scales, norms and
    biases are tuned until the block's output is that of the dense block in the dense model (NanoQuant, arXiv
    2602.06694, works so too). Its errors are weighted by what the model's output feels of them. Layers
    outside the blocks are quantized as :func:`.quantize_checkpoint` does.

    One block and its optimizer are in memory, besides what lies outside the blocks. Hidden states of all
    sequences are in files of the work folder ``<out>.partial``. Killed at any moment, the same call
    continues after the last finished block, and the bytes of ``out`` are the same.

    Args:
        model_dir: directory of a dense checkpoint: safetensors, ``config.json`` and a tokenizer.
        out: directory to make.
        config: size, method and seed of the layers' quantization; ranks must not depend on spectra. With
            ``budget="kl"`` they depend on what the model's output loses when a layer alone is quantized.
        data: files or directories of text, see :func:`.find_files`.
        settings: text, steps and rates.
        include: shell-style pattern or patterns on module names.
        exclude: likewise; wins. Heads by default.
        head: as for :func:`.quantize_checkpoint`. Perplexities are those of the dense head and embedding.
        embedding: likewise.
        text_field: name of the text in JSON lines and tables.
        threads: torch's threads, by default those it has; other numbers change the last bits.
        device: where to compute.
        progress: whether to show a bar, where stderr is a terminal, and a line for each block.
        resume: continue an interrupted run; otherwise it is discarded.
        overwrite: whether ``out`` may exist; it is replaced at the end.
        keep_work: whether the work folder stays.
        keep_latents: whether ``out`` holds how far its signs are from flipping, 16 bits for each, from which
            ``littlebit2 finetune --start`` goes on.

    Raises:
        FileExistsError, FileNotFoundError, OSError, RunError, TypeError: as :func:`.quantize_checkpoint`.
        ImportError: transformers is not installed.
        ValueError: as there; or the model is no causal language model of blocks that are called in turn on
            a hidden state, there is no tokenizer, or the text is too short.
    """
    started = time.perf_counter()
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be a positive integer or None, got {threads!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("method blockwise needs one process, got torchrun with several")
    if needs_spectra(config):
        raise ValueError(
            "method blockwise needs bpw or ranks and budget 'uniform' or 'kl': spectra are not measured"
        )
    place = check_device(device)
    source, target = Path(model_dir), Path(os.path.abspath(out))
    check_apart(target, work_path(target), model_dir=source)
    patterns = check_patterns("include", include), check_patterns("exclude", exclude)
    files = find_files(list(data))
    with _threads(threads), open_dense(source, name="model_dir") as checkpoint:
        tokenizer = load_tokenizer(source)
        chosen = settings or BlockwiseSettings()
        plan = _settle(checkpoint, config, chosen, patterns, (head, embedding), files, text_field, device)
        if progress and plan.length < chosen.length:
            tqdm.write(
                f"sequences have {plan.length} tokens, the model's positions, instead of {chosen.length}",
                file=sys.stderr,
            )
        pieces = ModelInPieces(
            plan.choice.trial.model, plan.choice.trial.parts, checkpoint.load_tensor, plan.blocks, place
        )
        fixed = check_blocks(pieces, pieces.model.get_input_embeddings().weight.shape[0])
        plan.settings[KEEP_LATENTS] = keep_latents
        work = BlockwiseWork(target, plan.settings)
        try:
            before = start_run(work, source, target, resume, overwrite)
            if before is not None:
                content = json.loads((target / BLOCKWISE_NAME).read_text("utf-8"))
                return BlockwiseReport.of(before, content)
            text = partial(
                sequences,
                work.tokens,
                files,
                tokenizer,
                length=plan.length,
                most=chosen.samples if chosen.minutes is None else PER_STEP * MOST,
                least=chosen.distill_samples,
                held_out=chosen.held_out,
                seed=chosen.seed,
                text_field=text_field,
            )
            _read_text(work, text)
            chosen = _with_precision(chosen, work, place)
            make = partial(BlockRunner, pieces, fixed=fixed, dtypes=plan.dtypes)
            if config.budget == "kl":
                ids = text(samples=chosen.kl_samples)
                plan = plan.with_ranks(work, make(chosen, ids[:, : chosen.kl_length]), progress)
            if chosen.minutes is not None:
                if STEPS not in work.chosen():
                    trial = make(chosen, text(samples=chosen.batch_size))
                    fit = fitting(trial, plan.of_block(0), len(pieces), plan.left(seconds_of_blocks(chosen)))
                    work.choose({SAMPLES: fit.samples, STEPS: fit.steps})
                known = work.chosen()
                chosen = replace(chosen, samples=known[SAMPLES], steps=known[STEPS])
                if progress:
                    tqdm.write(
                        f"{chosen.minutes:g} minutes: {chosen.samples} sequences, {chosen.steps} steps for "
                        "each block",
                        file=sys.stderr,
                    )
            runner = make(chosen, text(samples=chosen.samples))
            options = (progress, overwrite, keep_work, keep_latents)
            return _Run(checkpoint, work, plan, chosen, runner, text, started, *options).finish(
                source, target
            )
        finally:
            work.close()


def _with_precision(
    settings: BlockwiseSettings, work: BlockwiseWork, place: torch.device
) -> BlockwiseSettings:
    """Return the settings with a precision; one that is measured stays that of the run."""
    if settings.precision != "auto":
        return settings
    if PRECISION not in work.chosen():
        work.choose({PRECISION: resolve_precision("auto", place)})
    return replace(settings, precision=work.chosen()[PRECISION])


def _read_text(work: BlockwiseWork, text: Callable[..., torch.Tensor]) -> None:
    """Read the text, and leave nothing behind where it cannot be: there is no work yet that could be lost."""
    begun = work.tokens.exists()
    try:
        text(samples=1)
    except ValueError:
        if not begun:
            work.remove()
        raise


def _settle(
    checkpoint: DenseCheckpoint,
    config: QuantConfig,
    settings: BlockwiseSettings,
    patterns: tuple[tuple[str, ...], tuple[str, ...]],
    rows: tuple[str, str],
    files: Sequence[Path],
    text_field: str,
    device: str,
) -> _Plan:
    includes, excludes = patterns
    head, embedding = rows
    choice = choose_layers(
        checkpoint, config, include=includes, exclude=excludes, head=head, embedding=embedding
    )
    if choice.trial is None:
        raise ValueError(
            "method blockwise must run the model, which transformers cannot build: use --method admm "
            f"({'; '.join(choice.notes)})"
        )
    model = choice.trial.model
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"method blockwise needs a causal language model, got {type(model).__name__}: use --method admm"
        )
    length = fitting_length(settings.length, model.config)
    run = run_settings(
        checkpoint,
        config,
        includes,
        excludes,
        None,
        head=head,
        embedding=embedding,
        device=device,
        threads=torch.get_num_threads(),
    )
    run["blockwise"] = {
        **settings.as_dict(),
        "length": length,
        "data": describe_files(files),
        "text_field": text_field,
    }
    return _Plan(
        choice=choice,
        jobs=make_jobs(choice.layers, replace(config, budget="uniform")),
        blocks=find_blocks(model, choice.layers),
        length=length,
        dense_bytes=dense_bytes_of(checkpoint.dense, choice),
        dtypes={name: dtype for name, (_, dtype) in checkpoint.dense.items()},
        settings=run,
    )


class _Run:
    """The work itself, from the first unfinished block on."""

    def __init__(
        self,
        checkpoint: DenseCheckpoint,
        work: BlockwiseWork,
        plan: _Plan,
        settings: BlockwiseSettings,
        runner: BlockRunner,
        text: Callable[..., torch.Tensor],
        started: float,
        progress: bool,
        overwrite: bool,
        keep_work: bool,
        keep_latents: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.work = work
        self.plan = plan
        self.settings = settings
        self.runner = runner
        self.text = text
        self.started = started
        self.pieces = runner.pieces
        self.progress = progress
        self.overwrite = overwrite
        self.keep_work = keep_work
        self.keep_latents = keep_latents
        self.sensitivity: list[torch.Tensor] | None = None
        self.entries: list[dict[str, Any]] = []
        self.seconds: Counter[str] = Counter()
        self.seconds.update(plan.seconds)
        #: Of ranks and blocks that an earlier process finished.
        self.seconds_before = plan.seconds_before
        self.changed: dict[str, torch.Tensor] = {}

    def finish(self, source: Path, target: Path) -> BlockwiseReport:
        """Do what is left to do, and assemble the result."""
        self._tell_text()
        first = self._finished_blocks()
        dense, quantized = self._states(first)
        self._check_space(dense)
        if self.settings.sensitivity and first < len(self.pieces):
            self.sensitivity = self.work.sensitivity()
            if self.sensitivity is None:
                self.sensitivity = measure_sensitivity(self.runner)
                self.work.write_sensitivity(self.sensitivity)
        with self._bar("blockwise", len(self.pieces), " blocks", first) as bar:
            for index in range(first, len(self.pieces)):
                dense, quantized = self._block(index, dense, quantized)
                self._tell(bar)
        for job in self.plan.outside():
            if self.work.finished(job) is None:
                quantize_batch(self.checkpoint, self.work, {}, self.pieces.device, [job])
        perplexity = {"dense": self._perplexity(dense), "tuned": self._perplexity(quantized)}
        distillation = self._distilled() if self._distills() else None
        if distillation is not None:
            perplexity["distilled"] = distillation.pop("perplexity")
        content = {
            "settings": {
                **self.plan.settings["blockwise"],
                "samples": len(self.runner.samples),
                "steps": self.settings.steps,
                "precision": self.settings.precision,
            },
            "blocks": self.entries,
            "allocation": self.plan.allocation,
            "distillation": distillation,
            "perplexity": perplexity,
            "vocabulary": int(self.pieces.model.get_output_embeddings().weight.shape[0]),
            "tokens": len(self.runner.held_out) * (self.plan.length - 1),
        }
        run: RunReport = assemble(
            source,
            target,
            self.work,
            self.plan.jobs,
            self.plan.choice,
            self.plan.settings,
            overwrite=self.overwrite,
            changed=self.changed,
            files={BLOCKWISE_NAME: content},
            copies=self._latents() if self.keep_latents else {},
            keep_work=self.keep_work,
        )
        return BlockwiseReport.of(run, content, dict(self.seconds))

    def _tell_text(self) -> None:
        got, wanted = len(self.runner.samples), self.settings.samples
        if self.progress and got < wanted:
            tqdm.write(
                f"warning: the text gives {got} of {wanted} sequences of {self.plan.length} tokens, besides "
                f"{self.settings.held_out} that are held out",
                file=sys.stderr,
            )

    def _latents(self) -> dict[str, Path]:
        """Files that training goes on from, by their path in the result."""
        paths = map(self.work.latents_path, range(len(self.pieces)))
        return {f"{LATENTS}/{path.name}": path for path in paths}

    def _finished_blocks(self) -> int:
        for index in range(len(self.pieces)):
            found = self.work.finished_block(index, self.plan.of_block(index))
            if found is None:
                return index
            entry, seconds, changed = found
            self.entries.append(entry)
            self.seconds.update(seconds)
            self.changed.update(changed)
            self.seconds_before += sum(seconds.values())
        return len(self.pieces)

    def _shape(self) -> tuple[int, int, int]:
        rows, length = self.runner.ids.shape
        return rows, length, int(self.pieces.embed(self.runner.ids[:1]).shape[-1])

    def _states(self, index: int) -> tuple[States, States]:
        """Return the hidden states before a block, of the dense and of the quantized model."""
        shape = self._shape()
        path = self.work.states("dense", index)
        if index == 0 and not path.is_file():
            self.runner.embed(States(path, shape, create=True))
        return States(path, shape), States(self.work.states("quantized", index), shape)

    def _check_space(self, states: States) -> None:
        one = 4 * states.shape[0] * states.shape[1] * states.shape[2]
        layers = sum(job.stored_bytes for job in self.plan.jobs)
        # A latent's magnitude has 16 bits for one of the layer's.
        check_space(self.work.path, 4 * one + 18 * layers + self.plan.dense_bytes)

    def _block(self, index: int, dense: States, quantized: States) -> tuple[States, States]:
        new = {
            kind: States(self.work.states(kind, index + 1), dense.shape, create=True)
            for kind in ("dense", "quantized")
        }
        weights = None
        if self.sensitivity is not None:
            weights = mixed(self.sensitivity[index], self.settings.sensitivity).to(self.pieces.device)
        result = self.runner.run(
            index,
            self.plan.of_block(index),
            dense,
            quantized,
            next_dense=new["dense"],
            next_quantized=new["quantized"],
            weights=weights,
        )
        self.entries.append(self.work.write_block(index, result))
        self.seconds.update(result.seconds)
        self.changed.update(result.changed)
        self.work.drop_states(index)
        return self._states(index + 1)

    def _tell(self, bar: Any) -> None:
        bar.update()
        if self.progress:
            entry = self.entries[-1]
            bar.write(
                f"block {entry['index']}: error {entry['before']:.4f} before tuning, {entry['after']:.4f} "
                f"after {entry['steps']} steps",
                file=sys.stderr,
            )

    def _perplexity(self, states: States) -> float:
        """Return the perplexity of the held-out sequences from their hidden states after the last block."""
        total = 0.0
        for rows in batches(self.runner.held_out, self.settings.batch_size):
            ids = self.runner.ids[rows].to(self.pieces.device)
            logits = self.pieces.finish(ids, states.read(rows).to(self.pieces.device))
            total += float(token_nll(logits, ids))
        return self._exponential(total)

    def _exponential(self, nll: float) -> float:
        """Return the perplexity of a summed negative log-likelihood of the held-out tokens."""
        count = len(self.runner.held_out) * (self.plan.length - 1)
        return Perplexity(nll / count, count).value

    def _distills(self) -> bool:
        """Whether the whole model is distilled; once there was no time for it, it stays so."""
        if self.settings.distills and DISTILL_STEPS not in self.work.chosen():
            if is_worth_distilling(self.settings, self._spent()):
                return True
            self.work.choose({DISTILL_STEPS: 0})
            if self.progress:
                tqdm.write("distillation: no time is left for it", file=sys.stderr)
        return self.settings.distills and self.work.chosen()[DISTILL_STEPS] > 0

    def _spent(self) -> float:
        return time.perf_counter() - self.started + self.seconds_before

    def _distilled(self) -> dict[str, Any]:
        """Distill the whole model unless that is done; return its entry of the report."""
        found = self.work.distilled()
        if found is None:
            ids = self.text(samples=self.settings.distill_samples)
            held_out = self.settings.held_out
            distillation = Distillation(
                self.runner,
                [self.plan.of_block(index) for index in range(len(self.pieces))],
                self.work.load_layer,
                self.work.latents,
                self.changed,
                ids[:-held_out],
                ids[-held_out:],
            )
            steps = self._distill_steps(distillation)
            state = self.work.distillation
            with self._bar("distill", steps, " steps", state.done()) as bar:

                def measured(done: int, kl: float) -> None:
                    if self.progress:
                        bar.write(f"distillation: KL {kl:.4f} after {done} steps", file=sys.stderr)

                made = distillation.run(steps, state, lambda step: bar.update(), measured)
            entry = {
                "before": made.tuned.before,
                "after": made.tuned.after,
                "steps": made.tuned.steps,
                "perplexity": self._exponential(made.nll),
            }
            self.work.write_distilled(made, entry)
            found = entry, made.changed
        self.changed.update(found[1])
        return dict(found[0])

    def _distill_steps(self, distillation: Distillation) -> int:
        """Return the steps that were asked for, or that fit what is left of the time."""
        settings = self.settings
        if settings.minutes is None and settings.distill_minutes is None:
            return settings.distill_steps
        if DISTILL_STEPS not in self.work.chosen():
            if settings.distill_minutes is not None:
                seconds = 60 * settings.distill_minutes
            else:
                assert settings.minutes is not None  # as above
                seconds = 60 * settings.minutes - self._spent()
            self.work.choose({DISTILL_STEPS: fitting_steps(distillation, seconds)})
        steps: int = self.work.chosen()[DISTILL_STEPS]
        if self.progress:
            tqdm.write(f"distillation: {steps} steps", file=sys.stderr)
        return steps

    def _bar(self, label: str, total: int, unit: str, done: int = 0) -> Any:
        return tqdm(
            total=total,
            initial=done,
            desc=label,
            unit=unit,
            disable=None if self.progress else True,
            file=sys.stderr,
            smoothing=0.3,
        )


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
