"""One warp on its way through a kernel: branches as parameters decide them, cycles by control bits.

An instruction starts when the stall of the one before it is over and the scoreboards that it waits for are
free. Nothing else is counted: not other warps on the same scheduler, not the units' throughput, not misses
of the instruction cache. So the cycles are a lower bound of a warp that has its scheduler to itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from benchmarks.sass.arithmetic import execute
from benchmarks.sass.encoding import NO_SCOREBOARD, Instruction
from benchmarks.sass.registers import LANES, Registers, Values

__all__ = ["LATENCIES", "Event", "Memory", "Warp", "special_registers"]

#: Assumed cycles until the result of an instruction with a scoreboard is there.
LATENCIES = {"L2": 290, "L1": 40, "shared": 30, "constant": 30, "mma": 33, "barrier": 20, "other": 20}
#: Lanes of a warp, 1 for those that are meant.
Mask = npt.NDArray[np.uint64]
_LINE = 128
_READ_RELEASE = 12  # cycles until the operands of a store or a load have been read
_ADDRESS = re.compile(r"\[(U?R\d+|URZ|RZ)?(\.64|\.U32|\.X4|\.X8|\.X16)?(\+?UR\d+)?(\+?-?0x[0-9a-f]+)?\]$")


@dataclass(frozen=True)
class Event:
    """A mark at a time: "wait" (for the kernel before), "release" (of the next), "barrier", "mma", "exit"."""

    kind: str
    cycle: int


@dataclass
class Memory:
    """Lines of global memory that a block's warps have asked for, and when they are in the L1 cache."""

    lines: dict[int, int] = field(default_factory=dict)

    def load(self, addresses: Values, lanes: Values, cycle: int, *, kept: bool) -> int:
        """The cycle at which a load that starts now is done."""
        if addresses is None or lanes is None:
            return cycle + LATENCIES["L2"]
        done = cycle + LATENCIES["L1"]
        for line in {int(address) // _LINE for address in addresses[lanes != 0]}:
            arrives = self.lines.get(line)
            if arrives is None:
                arrives = cycle + LATENCIES["L2"]
                if kept:
                    self.lines[line] = arrives
            # A warp that was followed before may have asked for the line later than this one does.
            done = max(done, min(arrives, cycle + LATENCIES["L2"]))
        return done


@dataclass
class _Group:
    """Lanes at one place; ``waits`` names the convergence barrier that they have reached."""

    at: int
    lanes: Mask
    waits: str = ""


class Warp:
    """Runs one warp; :meth:`run` stops at every barrier of the block to be told when all are there."""

    def __init__(
        self, code: tuple[Instruction, ...], registers: Registers, memory: Memory, start: int = 0
    ) -> None:
        self.code = code
        self.registers = registers
        self.memory = memory
        self.cycle = start
        self.events: list[Event] = []
        self.executed: dict[int, int] = {}
        #: Loads of global memory before the wait for the kernel before.
        self.early_loads = 0
        #: Branches that depend on data: they are taken to go straight on.
        self.assumed: set[int] = set()
        self._index = {instruction.address: i for i, instruction in enumerate(code)}
        self._scoreboards: list[list[int]] = [[] for _ in range(6)]
        self._members: dict[str, Mask] = {}
        self._groups = [_Group(0, np.ones(LANES, np.uint64))]

    @property
    def instructions(self) -> int:
        """How many instructions were carried out."""
        return sum(self.executed.values())

    def run(self, most: int = 200_000) -> Iterator[int]:
        """Yield the cycle of arrival at each barrier; go on from ``cycle``, which the caller may raise."""
        while self._groups:
            group = self._ready()
            instruction = self.code[group.at]
            if self.instructions >= most:
                raise ValueError(
                    f"the path must end within {most} instructions, got to {instruction.address:#x}"
                )
            self.executed[instruction.address] = self.executed.get(instruction.address, 0) + 1
            yield from self._step(group, instruction)

    def _ready(self) -> _Group:
        """The lanes that go on: those furthest back, as what lies ahead is where they meet."""
        for name in {group.waits for group in self._groups if group.waits}:
            waiting = [group for group in self._groups if group.waits == name]
            here = np.bitwise_or.reduce([group.lanes for group in waiting])
            alive = np.bitwise_or.reduce([group.lanes for group in self._groups])
            if np.array_equal(here, self._members[name] & alive):
                merged = _Group(waiting[0].at, here)
                self._groups = [group for group in self._groups if group.waits != name] + [merged]
        going = [group for group in self._groups if not group.waits]
        if not going:
            raise ValueError("lanes wait for one another at different places")
        return min(going, key=lambda group: group.at)

    def _step(self, group: _Group, instruction: Instruction) -> Iterator[int]:
        control = instruction.control
        start = self.cycle
        for scoreboard in range(6):
            if control.waits >> scoreboard & 1 and self._scoreboards[scoreboard]:
                start = max(start, *self._scoreboards[scoreboard])
                self._scoreboards[scoreboard].clear()
        lanes = self._active(group, instruction)
        self.cycle = start + max(control.stall, 1)
        if lanes is not None and lanes.any():
            self._hold(instruction, lanes, start)
            yield from self._note(instruction, start)
        group.at += 1
        if instruction.opcode in _BRANCHES:
            self._branch(group, instruction, lanes)
        else:
            execute(instruction, self.registers, lanes)

    def _active(self, group: _Group, instruction: Instruction) -> Values:
        if not instruction.guard:
            return group.lanes
        guard = self.registers.predicate(instruction.guard[1:])
        return None if guard is None else guard & group.lanes

    def _hold(self, instruction: Instruction, lanes: Values, start: int) -> None:
        control = instruction.control
        if control.write != NO_SCOREBOARD:
            self._scoreboards[control.write].append(self._done(instruction, lanes, start))
        if control.read != NO_SCOREBOARD:
            self._scoreboards[control.read].append(start + _READ_RELEASE)

    def _done(self, instruction: Instruction, lanes: Values, start: int) -> int:
        opcode = instruction.opcode
        if opcode in ("LDG", "LD", "LDGSTS"):
            self.early_loads += not any(event.kind == "wait" for event in self.events)
            past = "NA" in instruction.modifiers or "STRONG" in instruction.modifiers or opcode == "LDGSTS"
            return self.memory.load(self._address(instruction), lanes, start, kept=not past)
        if opcode in ("LDS", "LDSM", "ATOMS"):
            return start + LATENCIES["shared"]
        if opcode in ("LDC", "ULDC", "LDCU"):
            return start + LATENCIES["constant"]
        return start + LATENCIES["mma" if opcode.endswith("MMA") else "other"]

    def _address(self, instruction: Instruction) -> Values:
        operand = next((text for text in instruction.operands if text.endswith("]")), "")
        match = _ADDRESS.search(operand)
        if match is None:
            return None
        total = np.zeros(LANES, np.uint64)
        if match[1] is not None:
            wide = match[2] == ".64"
            value = self.registers.read_wide(match[1]) if wide else self.registers.read(match[1])
            if value is None:
                return None
            total = total + value
        if match[3] is not None:
            base = self.registers.read_wide(match[3].lstrip("+"))
            if base is None:
                return None
            total = total + base
        return total + np.uint64(int((match[4] or "0x0").lstrip("+"), 16) % (1 << 64))

    def _note(self, instruction: Instruction, start: int) -> Iterator[int]:
        opcode = instruction.opcode
        if opcode == "ACQBULK":
            self.events.append(Event("wait", start))
        elif opcode == "PREEXIT":
            self.events.append(Event("release", start))
        elif opcode.endswith("MMA"):
            self.events.append(Event("mma", start))
        elif opcode in ("BAR", "UCGABAR_WAIT"):
            yield start
            self.events.append(Event("barrier", self.cycle))
        elif opcode == "DEPBAR":
            self._drain(instruction)

    def _drain(self, instruction: Instruction) -> None:
        """DEPBAR.LE SB0, 0x1: at most so many of a scoreboard's may be under way."""
        scoreboard = int(instruction.operands[0].removeprefix("SB"))
        left = int(instruction.operands[1], 16) if len(instruction.operands) > 1 else 0
        pending = sorted(self._scoreboards[scoreboard])
        if len(pending) > left:
            self.cycle = max(self.cycle, pending[len(pending) - left - 1])
            self._scoreboards[scoreboard] = pending[len(pending) - left :]

    def _branch(self, group: _Group, instruction: Instruction, lanes: Values) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if lanes is None:
            if opcode not in ("BRA", "BREAK", "CALL"):
                raise ValueError(
                    f"{instruction.name} at {instruction.address:#x} depends on what is not known"
                )
            self.assumed.add(instruction.address)
            return
        if opcode == "BSSY":
            self._members[operands[0]] = group.lanes.copy()
        elif opcode == "BREAK":
            which = self.registers.predicate(operands[0]) if len(operands) > 1 else np.ones(LANES, np.uint64)
            if which is None:
                self.assumed.add(instruction.address)
                return
            self._members[operands[-1]] = self._members[operands[-1]] & ~(lanes & which)
        elif opcode == "BSYNC":
            self._split(group, lanes, group.at, operands[0])
        elif opcode == "EXIT":
            group.lanes = group.lanes & ~lanes
            if not group.lanes.any():
                self._groups.remove(group)
            self.events.append(Event("exit", self.cycle))
        elif opcode == "CALL":
            self._split(group, lanes, self._target(operands[-1]), "")
        elif opcode == "RET":
            back = self.registers.read(operands[0].split()[0])
            if back is None:
                raise ValueError(f"RET at {instruction.address:#x} depends on what is not known")
            self._split(group, lanes, self._index[int(back[np.flatnonzero(lanes)[0]])], "")
        elif opcode == "BRA":
            self._jump(group, instruction, lanes)

    def _jump(self, group: _Group, instruction: Instruction, lanes: Mask) -> None:
        operands = instruction.operands
        if (
            "DIV" in instruction.modifiers
        ):  # all lanes of a mask are there, or it would not be a warp-wide operation
            return
        if len(operands) > 1 and "CONV" not in instruction.modifiers:
            condition = self.registers.predicate(operands[0])
            if condition is None:
                self.assumed.add(instruction.address)
                return
            lanes = lanes & condition
        self._split(group, lanes, self._target(operands[-1]), "")

    def _target(self, operand: str) -> int:
        return self._index[int(operand.rsplit(maxsplit=1)[-1].strip("`()"), 16)]

    def _split(self, group: _Group, lanes: Mask, at: int, waits: str) -> None:
        """Lanes of the group go on at another place, or wait there."""
        if not lanes.any():
            return
        if np.array_equal(lanes, group.lanes):
            group.at, group.waits = at, waits
            return
        group.lanes = group.lanes & ~lanes
        self._groups.append(_Group(at, lanes, waits))


_BRANCHES = frozenset(("BRA", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET"))


def special_registers(thread: int, block: Mapping[str, int]) -> dict[str, Values]:
    """Special registers of the warp whose first thread it is."""
    found: dict[str, Values] = {
        "SR_TID.X": np.arange(thread, thread + LANES, dtype=np.uint64),
        "SR_LANEID": np.arange(LANES, dtype=np.uint64),
    }
    for axis in "XYZ":
        found[f"SR_CTAID.{axis}"] = np.full(LANES, block.get(axis.lower(), 0), np.uint64)
    return found
