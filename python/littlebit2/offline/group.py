"""The processes of one run: alone, or started by ``torchrun`` (environment RANK, WORLD_SIZE)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from littlebit2.disk import RunError

from .jobs import Job
from .work import reason_of

__all__ = ["Group", "process_group", "share_out"]

T = TypeVar("T")

#: Ranks wait for each other's layers, which may take hours; a rank that dies is noticed at once anyhow.
_PATIENCE = timedelta(days=30)


class Group:
    """This process among the processes of the run.

    Attributes:
        rank: 0 to ``size - 1``; rank 0 makes the work directory and assembles.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, handle: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._handle = handle

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` in every process and wait for all; a failure of one is a failure of all.

        Raises:
            Exception: what ``action`` raised in this process.
            RunError: what it raised in another process; names its rank.
        """
        if self.size == 1:
            return action()
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        reasons = self._gather(None if failure is None else reason_of(failure))
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise RunError(f"rank {rank}: {reason}")
        return result  # type: ignore[return-value]

    def from_leader(self, action: Callable[[], T]) -> T:
        """Run ``action`` in rank 0 and return its (picklable) result in every process.

        Raises:
            Exception: as :meth:`together`.
        """
        value = self.together(lambda: action() if self.leads else None)
        return self._gather(value)[0]

    def collect(self, action: Callable[[], T]) -> list[T]:
        """Run ``action`` in every process and return all (picklable) results, by rank, in every process.

        Raises:
            Exception: as :meth:`together`.
        """
        return self._gather(self.together(action))

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        import torch.distributed as dist  # noqa: PLC0415  # not in every build of torch

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._handle)
        return values


@contextmanager
def process_group() -> Iterator[Group]:
    """Yield the :class:`Group` that the environment describes; alone where it describes none.

    Raises:
        RunError: the environment asks for several processes and torch was built without distributed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield Group()
        return
    import torch.distributed as dist  # noqa: PLC0415  # not in every build of torch

    if not dist.is_available():
        raise RunError("WORLD_SIZE > 1 needs a torch built with torch.distributed")
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    handle = None if ours else dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), handle)
    finally:
        if ours:
            dist.destroy_process_group()


def share_out(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Split jobs over ``size`` processes so that they finish at about the same time, each in model order."""
    shares: list[list[Job]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for job in sorted(jobs, key=lambda job: (-job.cost, job.index)):
        least = loads.index(min(loads))
        shares[least].append(job)
        loads[least] += job.cost
    return [sorted(share, key=lambda job: job.index) for share in shares]
