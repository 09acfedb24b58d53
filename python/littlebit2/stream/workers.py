"""Jobs on threads. Torch releases the interpreter's lock inside its operators, where the time goes."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .jobs import Job

__all__ = ["choose_workers", "run_jobs"]

THREAD_NAME = "littlebit2-quantize"


def choose_workers(jobs: Sequence[Job], workers: int | None, threads: int) -> int:
    """Return how many layers to work on at once.

    Args:
        jobs: what is to be done.
        workers: asked for, or ``None``: as many as the processor's cores (shared with the other processes
            of ``torchrun`` on this machine) and four fifths of the free memory allow.
        threads: threads of each worker.

    Raises:
        ValueError: ``workers`` is not positive.
    """
    if workers is not None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a positive integer or None, got {workers!r}")
        return min(workers, max(len(jobs), 1))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) // (threads * processes)
    largest = max((job.working_bytes for job in jobs), default=1)
    by_memory = int(0.8 * _available_memory() / processes / largest)
    return max(1, min(cores, by_memory, len(jobs)))


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run_jobs(
    jobs: Iterable[Job],
    do: Callable[[Job], None],
    done: Callable[[Job], None],
    *,
    workers: int,
    threads: int,
) -> None:
    """Run ``do`` on every job, ``workers`` at a time, and ``done`` after each in the calling thread.

    After a failure no further job is begun; those that run are finished first, then the failure is raised.
    An interrupt does not wait for them.

    Args:
        jobs: in the order in which they are begun.
        do: the work; called from several threads.
        done: called in the order in which jobs finish.
        workers: number of jobs at a time; with 1 all happens in the calling thread.
        threads: torch's threads inside one job, so that results do not depend on ``workers``.
    """
    with _torch_threads(threads):
        if workers == 1:
            for job in jobs:
                do(job)
                done(job)
        else:
            _run_threads(list(jobs), do, done, workers, threads)


def _run_threads(
    jobs: list[Job], do: Callable[[Job], None], done: Callable[[Job], None], workers: int, threads: int
) -> None:
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    outcomes: queue.SimpleQueue[tuple[Job | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        torch.set_num_threads(threads)
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                do(job)
            except BaseException as error:
                stop.set()
                outcomes.put((job, error))
            else:
                outcomes.put((job, None))
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
                failures.append((ended.index, failure))
            else:
                done(ended)
    finally:
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
