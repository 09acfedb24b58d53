"""Registers of a warp: what is known of each lane's integers and predicates.

Values that come from memory, and all results of floating-point arithmetic, are unknown. Addresses, loop
counts and branches of the kernels follow from parameters and indices alone, which are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["LANES", "Constants", "Registers", "Values"]

LANES = 32
#: One integer or predicate for each lane, or None where it is unknown.
Values = npt.NDArray[np.uint64] | None
_MASK = np.uint64(0xFFFFFFFF)
_REGISTER = re.compile(r"^(U?R)(\d+|Z)(?:\.(\w+))?$")
_CONSTANT = re.compile(r"^c\[0x([02])\]\[(?:(U?R\d+|URZ|RZ)(?:\.\w+)?\+?)?(0x[0-9a-f]+)?\]$")


@dataclass(frozen=True)
class Constants:
    """A kernel's parameters, as they lie in constant bank 0 from ``base`` on, and its literals (bank 2)."""

    base: int
    data: bytes
    literals: bytes = b""

    def load(self, bank: str, offsets: npt.NDArray[np.uint64], nbytes: int) -> Values:
        """What lies at the offsets, or None where one of them is outside of what is known."""
        data, base = (self.data, self.base) if bank == "0" else (self.literals, 0)
        found = []
        for offset in offsets:
            first = int(offset) - base
            if first < 0 or first + nbytes > len(data):
                return None
            found.append(int.from_bytes(data[first : first + nbytes], "little"))
        return np.array(found, np.uint64)


@dataclass
class Registers:
    """Registers and predicates by name ("R4", "UR4", "P0", "UP0"), read and written by operands."""

    constants: Constants
    special: Mapping[str, Values]
    values: dict[str, Values] = field(default_factory=dict)
    predicates: dict[str, Values] = field(default_factory=dict)

    def read(self, operand: str, *, inverted: bool = False) -> Values:
        """32 bits of an operand; a minus negates, in carry chains (``inverted``) it inverts as ``~`` does."""
        text = operand.replace(".reuse", "").strip()
        if text[:1] in "-~" and not text[1:].startswith("0x"):
            value = self.read(text[1:])
            if value is None:
                return None
            if text[0] == "~" or inverted:
                return ~value & _MASK
            return (np.uint64(1 << 32) - value) & _MASK
        if text.startswith(("0x", "-0x")):
            return np.full(LANES, int(text, 16) & 0xFFFFFFFF, np.uint64)
        if (match := _REGISTER.match(text)) is not None:
            return self.register(match[1], match[2])
        if (match := _CONSTANT.match(text)) is not None:
            return self.constant(match, 4)
        return None

    def register(self, kind: str, number: str, further: int = 0) -> Values:
        """A register, or one ``further`` from it."""
        if number == "Z":
            return np.zeros(LANES, np.uint64)
        return self.values.get(f"{kind}{int(number) + further}")

    def constant(self, operand: re.Match[str], nbytes: int) -> Values:
        """An operand in constant memory."""
        bank, index, offset = operand.groups()
        first = np.full(LANES, int(offset or "0x0", 16), np.uint64)
        if index is not None:
            start = self.read(index)
            if start is None:
                return None
            first = first + start & _MASK
        return self.constants.load(bank, first, nbytes)

    def read_constant(self, operand: str, nbytes: int) -> Values:
        """An operand of a load from constant memory."""
        match = _CONSTANT.match(operand)
        return None if match is None else self.constant(match, nbytes)

    def read_wide(self, operand: str) -> Values:
        """64 bits of an operand: a pair of registers, an extended immediate or constant."""
        text = operand.replace(".reuse", "").strip()
        if (match := _REGISTER.match(text)) is not None:
            low, high = self.register(match[1], match[2]), self.register(match[1], match[2], 1)
            return None if low is None or high is None else low | high << np.uint64(32)
        if (match := _CONSTANT.match(text)) is not None:
            return self.constant(match, 8)
        return self.read(text)

    def predicate(self, operand: str) -> Values:
        """A predicate as 0 and 1."""
        name = operand.strip().lstrip("!")
        value = np.ones(LANES, np.uint64) if name in ("PT", "UPT") else self.predicates.get(name)
        if value is not None and operand.strip().startswith("!"):
            return np.uint64(1) - value
        return value

    def write(self, operand: str, value: Values, lanes: Values, further: int = 0) -> None:
        """Set a register in the lanes of a mask (None: nobody knows which)."""
        match = _REGISTER.match(operand.strip())
        if match is None or match[2] == "Z":
            return
        name = f"{match[1]}{int(match[2]) + further}"
        self.values[name] = _merged(self.values.get(name), *_for_all(name, value, lanes))

    def write_wide(self, operand: str, value: Values, lanes: Values) -> None:
        """Set a pair of registers."""
        self.write(operand, None if value is None else value & _MASK, lanes)
        self.write(operand, None if value is None else value >> np.uint64(32), lanes, 1)

    def write_predicate(self, operand: str, value: Values, lanes: Values) -> None:
        """Set a predicate."""
        name = operand.strip()
        if name not in ("PT", "UPT", "RZ"):
            self.predicates[name] = _merged(self.predicates.get(name), *_for_all(name, value, lanes))


def _for_all(name: str, value: Values, lanes: Values) -> tuple[Values, Values]:
    """What is written and in which lanes: a uniform register takes the first lane's value for all of them."""
    if not name.startswith("U") or lanes is None or not lanes.any():
        return value, lanes
    first = int(np.flatnonzero(lanes)[0])
    return None if value is None else np.full(LANES, value[first]), np.ones(LANES, np.uint64)


def _merged(old: Values, new: Values, lanes: Values) -> Values:
    if lanes is None or (new is None and bool(np.any(lanes))):
        return None
    if bool(np.all(lanes)):
        return new
    if old is None:
        # Lanes outside of the mask have held nothing that is known: they are not read before they are set.
        old = np.zeros(LANES, np.uint64)
    return old if new is None else np.where(lanes != 0, new, old)
