"""Instructions of a disassembled kernel with their control bits (sm_80 and newer, 128 bits each).

The compiler schedules by these bits: after how many cycles the warp may go on, which of six scoreboards an
instruction of unknown latency holds until its result is there (write) or its operands are read (read), and
which scoreboards must be free before an instruction starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["NO_SCOREBOARD", "Control", "Instruction", "decode_control", "parse_functions"]

#: The number that an instruction has instead of a scoreboard's where it holds none.
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Control:
    """Control bits of an instruction; ``waits`` has bit i set if scoreboard i must be free."""

    stall: int
    yields: bool
    write: int
    read: int
    waits: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``guard`` is its predicate ("@!P0"), or empty; ``name`` its opcode with modifiers."""

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    control: Control

    @property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """What follows the opcode."""
        return tuple(self.name.split(".")[1:])


def decode_control(low: int, high: int) -> Control:
    """Control bits from the two 64-bit halves of an instruction."""
    bits = (low | high << 64) >> 105
    return Control(
        stall=bits & 15,
        yields=not bits >> 4 & 1,
        write=bits >> 5 & 7,
        read=bits >> 8 & 7,
        waits=bits >> 11 & 63,
    )


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_SECOND_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


def _instruction(address: int, text: str, low: int, high: int) -> Instruction:
    guard = ""
    if text.startswith("@"):
        guard, _, text = text.partition(" ")
    name, _, rest = text.strip().partition(" ")
    operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
    return Instruction(address, guard, name, operands, decode_control(low, high))


def parse_functions(text: str) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
    """Name and instructions of every function in the output of ``cuobjdump --dump-sass``."""
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        lines = part.splitlines()
        found = []
        pending: tuple[int, str, int] | None = None
        for line in lines[1:]:
            if (match := _INSTRUCTION.match(line)) is not None:
                pending = (int(match[1], 16), match[2], int(match[3], 16))
            elif pending is not None and (match := _SECOND_HALF.match(line)) is not None:
                found.append(_instruction(*pending, int(match[1], 16)))
                pending = None
        yield lines[0].strip(), tuple(found)
