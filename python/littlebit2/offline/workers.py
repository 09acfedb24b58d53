"""Batches of jobs on threads: torch lets go of the interpreter inside its operators, where the time goes."""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from littlebit2.quantize.batching import batch_key, batch_size, in_batches

from .jobs import Job

__all__ = ["choose_workers", "make_batches", "run_jobs"]

THREAD_NAME = "littlebit2-quantize"


def choose_workers(batches: Sequence[Sequence[Job]], workers: int | None, threads: int) -> int:
    """Return how many batches of layers to work on at once.

    Args:
        batches: what is to be done.
        workers: asked for, or ``None``: as many as the processor's cores (shared with the other processes
            of ``torchrun`` on this machine) and four fifths of the free memory allow.
        threads: threads of each worker.

    Raises:
        ValueError: ``workers`` is not positive.
    """
    if workers is not None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a positive integer or None, got {workers!r}")
        return min(workers, max(len(batches), 1))
    largest = max((sum(job.working_bytes for job in batch) for batch in batches), default=1)
    by_memory = int(0.8 * _available_memory() / _processes() / largest)
    return max(1, min(_cores(threads), by_memory, len(batches)))


def make_batches(
    jobs: Sequence[Job], workers: int | None, threads: int, device: str
) -> list[tuple[Job, ...]]:
    """Return the jobs, small layers of one shape together as long as there is work for every worker."""
    crew = workers or _cores(threads)
    same = Counter(map(_key, jobs))

    def most(job: Job) -> int:
        k, n = job.source.in_features, job.source.out_features
        return min(batch_size(k, n, job.config, device), -(-same[_key(job)] // crew))

    return in_batches(jobs, _key, most)


def _key(job: Job) -> Hashable:
    return batch_key(job.source.in_features, job.source.out_features, job.config)


def _processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cores(threads: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // (threads * _processes()))


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run_jobs(
    batches: Iterable[Sequence[Job]],
    do: Callable[[Sequence[Job]], None],
    done: Callable[[Sequence[Job]], None],
    *,
    workers: int,
    threads: int,
) -> None:
    """Run ``do`` on every batch, ``workers`` at a time, and ``done`` after each in the calling thread.

    After a failure no further batch is begun; those that run are finished first, then the failure is raised.
    So they are after an interrupt, which may take as long as one batch; a second interrupt does not wait.

    Args:
        batches: in the order in which they are begun.
        do: the work; called from several threads.
        done: called in the order in which batches finish.
        workers: number of batches at a time; with 1 all happens in the calling thread.
        threads: torch's threads inside one batch, so that results do not depend on ``workers``.
    """
    with _torch_threads(threads):
        if workers == 1:
            for batch in batches:
                do(batch)
                done(batch)
        else:
            _run_threads(list(batches), do, done, workers, threads)


def _run_threads(
    batches: list[Sequence[Job]],
    do: Callable[[Sequence[Job]], None],
    done: Callable[[Sequence[Job]], None],
    workers: int,
    threads: int,
) -> None:
    waiting: queue.SimpleQueue[Sequence[Job]] = queue.SimpleQueue()
    for batch in batches:
        waiting.put(batch)
    outcomes: queue.SimpleQueue[tuple[Sequence[Job] | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        torch.set_num_threads(threads)
        while not stop.is_set():
            try:
                batch = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                do(batch)
            except BaseException as error:
                stop.set()
                outcomes.put((batch, error))
            else:
                outcomes.put((batch, None))
        outcomes.put((None, None))

    crew = [threading.Thread(target=work, name=THREAD_NAME, daemon=True) for _ in range(workers)]
    for thread in crew:
        thread.start()
    failures = []
    running = len(crew)
    try:
        while running:
            ended, failure = outcomes.get()
            if ended is None:
                running -= 1
            elif failure is not None:
                failures.append((ended[0].index, failure))
            else:
                done(ended)
    finally:
        # A thread that went on would write into a folder that the next run may hold by then.
        stop.set()
        for thread in crew:
            thread.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
