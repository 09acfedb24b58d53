"""The path of a block's warps through a kernel, and its cycles by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.sass.encoding import Instruction
from benchmarks.sass.registers import Constants, Registers
from benchmarks.sass.warp import Memory, Warp, special_registers

__all__ = ["PHASES", "Path", "parameter_base", "walk_block"]

#: Phases of a kernel, in order: up to the wait for the kernel before (0 where there is none), from there to
#: the first barrier, to the last MMA, to the last barrier, to the end.
PHASES = ("before the wait", "wait to barrier", "main loop", "reduction", "store")


@dataclass(frozen=True)
class Path:
    """What a block does: cycles of each of :data:`PHASES`, of the warp that is last in each.

    ``instructions`` are those of the warp that carries out most, ``code_bytes`` the code that the block
    touches, in lines of 128 bytes, ``assumed`` the branches that depend on data and were not taken,
    ``early_loads`` the most loads of global memory that a warp has under way before it waits for the kernel
    before (all of them where it never waits).
    """

    cycles: tuple[int, ...]
    instructions: int
    code_bytes: int
    assumed: int
    early_loads: int

    @property
    def after_wait(self) -> int:
        """Cycles from the end of the kernel before to the end."""
        return sum(self.cycles[1:])


def parameter_base(arch: int) -> int:
    """Where parameters start in constant bank 0."""
    return 0x380 if arch >= 100 else 0x210 if arch >= 90 else 0x160


def walk_block(
    code: tuple[Instruction, ...],
    arch: int,
    params: bytes,
    block: Mapping[str, int],
    threads: int,
    literals: bytes = b"",
) -> Path:
    """Walk all warps of a block from barrier to barrier."""
    constants = Constants(parameter_base(arch), params, literals)
    memory = Memory()
    warps = [
        Warp(code, Registers(constants, special_registers(first, block)), memory)
        for first in range(0, threads, 32)
    ]
    going = [(warp, warp.run()) for warp in warps]
    while going:
        arrived = []
        for warp, steps in going:
            at = next(steps, None)
            if at is not None:
                arrived.append((warp, steps, at))
        if arrived and len(arrived) != len(going):
            raise ValueError("all warps must meet at a barrier, some had ended")
        last = max((at for _, _, at in arrived), default=0)
        for warp, _, _ in arrived:
            warp.cycle = last + BARRIER
        going = [(warp, steps) for warp, steps, _ in arrived]
    assumed = {address for warp in warps for address in warp.assumed}
    touched = {address // 128 for warp in warps for address in warp.executed}
    return Path(
        cycles=_phases(warps),
        instructions=max(warp.instructions for warp in warps),
        code_bytes=128 * len(touched),
        assumed=len(assumed),
        early_loads=max(warp.early_loads for warp in warps),
    )


#: Assumed cycles from the last warp's arrival at a barrier until all go on.
BARRIER = 20


def _phases(warps: list[Warp]) -> tuple[int, ...]:
    def latest(kind: str, index: int) -> int | None:
        found = [[event.cycle for event in warp.events if event.kind == kind] for warp in warps]
        return max((cycles[index] for cycles in found if cycles), default=None)

    marks = [
        latest("wait", 0),
        latest("barrier", 0),
        latest("mma", -1),
        latest("barrier", -1),
        latest("exit", -1),
    ]
    cycles, previous = [], 0
    for mark in marks:
        at = previous if mark is None else max(mark, previous)
        cycles.append(at - previous)
        previous = at
    return tuple(cycles)
