"""What integer instructions compute: addresses, loop counters and the conditions of branches.

An instruction that is not listed here leaves unknown results, so that a path which depended on one would be
refused, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from benchmarks.sass.encoding import Instruction
from benchmarks.sass.registers import LANES, Registers, Values

__all__ = ["execute"]

Array = npt.NDArray[np.uint64]
_MASK = np.uint64(0xFFFFFFFF)
_U32 = np.uint64(32)
_PREDICATE = re.compile(r"^!?U?P(\d|T)$")


def _signed(value: Array) -> npt.NDArray[np.int64]:
    return value.astype(np.uint32).view(np.int32).astype(np.int64)


def _split(instruction: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """The register written, predicates written, operands, and predicates read at the end."""
    operands = list(instruction.operands)
    target = "RZ"
    if operands and not _PREDICATE.match(operands[0]):
        target = operands.pop(0)
    written = []
    while operands and _PREDICATE.match(operands[0]):
        written.append(operands.pop(0))
    read: list[str] = []
    while operands and _PREDICATE.match(operands[-1]):
        read.insert(0, operands.pop())
    return target, written, operands, read


def _sum(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, written, operands, read = _split(instruction)
    carried = "X" in instruction.modifiers
    total: Values = np.zeros(LANES, np.uint64)
    for operand in operands:
        value = registers.read(operand, inverted=carried)
        if total is None or value is None:
            total = None
            break
        # The negative of zero carries, as the sum of its inverse and one does.
        negated = operand.startswith("-") and not operand.startswith("-0x") and not carried
        total = total + np.where(value == 0, np.uint64(1 << 32), value) if negated else total + value
    if carried:
        for operand in read:
            carry = registers.predicate(operand)
            total = None if total is None or carry is None else total + carry
    registers.write(target, None if total is None else total & _MASK, lanes)
    for index, name in enumerate(written):
        more = None if total is None else (total >> _U32 > np.uint64(index)).astype(np.uint64)
        registers.write_predicate(name, more, lanes)


def _multiply(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, written, operands, read = _split(instruction)
    modifiers = instruction.modifiers
    wide = "WIDE" in modifiers or "HI" in modifiers
    a, b = (registers.read(operand) for operand in operands[:2])
    c = (
        registers.read_wide(operands[2])
        if wide
        else registers.read(operands[2], inverted="X" in modifiers and operands[2].startswith("-"))
    )
    if any(value is not None and not value.any() for value in (a, b)):  # times zero
        a = b = np.zeros(LANES, np.uint64)
    result: Values = None
    carry: Values = None
    if a is not None and b is not None and c is not None:
        unsigned = "U32" in modifiers or not wide
        x, y = (a, b) if unsigned else (_signed(a).astype(np.uint64), _signed(b).astype(np.uint64))
        with np.errstate(over="ignore"):
            product = x * y
            result = product + c
        carry = (result < product).astype(np.uint64)
        if "X" in modifiers and read:
            more = registers.predicate(read[0])
            result = None if more is None else result + more
        if result is not None and "HI" in modifiers:
            result = result >> _U32
    for name in written:
        registers.write_predicate(name, carry, lanes)
    if "WIDE" in modifiers:
        registers.write_wide(target, result, lanes)
    else:
        registers.write(target, None if result is None else result & _MASK, lanes)


def _lea(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, written, operands, read = _split(instruction)
    modifiers = instruction.modifiers
    shift = np.uint64(int(operands[-1], 16))
    a, b = registers.read(operands[0]), registers.read(operands[1])
    total: Values = None
    if a is not None and b is not None:
        if "HI" in modifiers:
            if "SX32" in modifiers:
                wide = _signed(a).astype(np.uint64)
            else:
                high = registers.read(operands[2]) if len(operands) > 3 else np.zeros(LANES, np.uint64)
                if high is None:
                    registers.write(target, None, lanes)
                    return
                wide = a | high << _U32
            shifted = wide >> (_U32 - shift) & _MASK
        else:
            shifted = a << shift & _MASK
        total = shifted + b
        if "X" in modifiers:
            carry = registers.predicate(read[0])
            total = None if carry is None else total + carry
    registers.write(target, None if total is None else total & _MASK, lanes)
    for name in written:
        registers.write_predicate(name, None if total is None else total >> _U32, lanes)


def _shift(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, _, operands, _ = _split(instruction)
    low, by, high = (registers.read(operand) for operand in operands)
    result: Values = None
    if low is not None and by is not None and high is not None:
        by = np.minimum(by, np.uint64(63))
        wide = low | high << _U32
        if "L" in instruction.modifiers:
            result = wide << by
            if "HI" in instruction.modifiers:
                result = result >> _U32
        elif "HI" in instruction.modifiers:
            by = np.minimum(by, _U32)
            signed = "S32" in instruction.modifiers
            result = (_signed(high) >> by.astype(np.int64)).astype(np.uint64) if signed else high >> by
        else:
            result = wide >> by
        result = result & _MASK
    registers.write(target, result, lanes)


def _logic(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, written, operands, _ = _split(instruction)
    if not _PREDICATE.match(instruction.operands[0]):
        pass
    elif len(operands) == 5:  # a predicate written first, then the register
        target = operands.pop(0)
    table = int(operands[3], 16)
    inputs = [registers.read(operand) for operand in operands[:3]]
    result: Values = None
    used = [any((table >> i & 1) != (table >> (i ^ bit) & 1) for i in range(8)) for bit in (4, 2, 1)]
    if all(value is not None or not needed for value, needed in zip(inputs, used, strict=True)):
        a, b, c = (np.zeros(LANES, np.uint64) if value is None else value for value in inputs)
        result = np.zeros(LANES, np.uint64)
        for index in range(8):
            if table >> index & 1:
                term = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
                result |= term & _MASK
    registers.write(target, result, lanes)
    for name in written:
        registers.write_predicate(name, None if result is None else (result != 0).astype(np.uint64), lanes)


_COMPARE: dict[str, Callable[..., npt.NDArray[np.bool_]]] = {
    "GE": np.greater_equal,
    "GT": np.greater,
    "LE": np.less_equal,
    "LT": np.less,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def _compare(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    first, second, left, right, *rest = instruction.operands
    modifiers = instruction.modifiers
    a, b, other = registers.read(left), registers.read(right), registers.predicate(rest[0])
    result: Values = None
    if a is not None and b is not None:
        unsigned = "U32" in modifiers
        x, y = (a, b) if unsigned else (_signed(a), _signed(b))
        if "EX" in modifiers:
            below = registers.predicate(rest[1])
            if below is not None:
                kind = {"GE": "GT", "LE": "LT"}.get(modifiers[0], modifiers[0])
                decided = _COMPARE[kind](x, y)
                equal = (x == y) & (below != 0)
                result = (equal if modifiers[0] == "EQ" else decided | equal).astype(np.uint64)
        else:
            result = _COMPARE[modifiers[0]](x, y).astype(np.uint64)
    for name, value in ((first, result), (second, None if result is None else np.uint64(1) - result)):
        if name not in ("PT", "UPT"):
            registers.write_predicate(name, _combined(modifiers, value, other), lanes)


def _combined(modifiers: tuple[str, ...], value: Values, other: Values) -> Values:
    absorbing = np.uint64(0 if "AND" in modifiers else 1)
    for known in (value, other):
        if known is not None and "XOR" not in modifiers and bool(np.all(known == absorbing)):
            return known
    if value is None or other is None:
        return None
    if "AND" in modifiers:
        return value & other
    return value | other if "OR" in modifiers else value ^ other


def _predicates(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    first, second, *inputs, table, other = instruction.operands
    values = [registers.predicate(operand) for operand in inputs]
    for name, text in ((first, table), (second, other)):
        bits = int(text, 16)
        used = [any((bits >> i & 1) != (bits >> (i ^ bit) & 1) for i in range(8)) for bit in (4, 2, 1)]
        result: Values = None
        if all(value is not None or not needed for value, needed in zip(values, used, strict=True)):
            a, b, c = (np.zeros(LANES, np.uint64) if value is None else value for value in values)
            index = a << np.uint64(2) | b << np.uint64(1) | c
            result = np.uint64(bits) >> index & np.uint64(1)
        registers.write_predicate(name, result, lanes)


def _select(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, left, right, chosen = instruction.operands
    a, b, which = registers.read(left), registers.read(right), registers.predicate(chosen)
    known = a is not None and b is not None and which is not None
    registers.write(target, np.where(which != 0, a, b) if known else None, lanes)  # type: ignore[arg-type]


def _least(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, _, operands, read = _split(instruction)
    values = [registers.read(operand) for operand in operands]
    least = registers.predicate(read[-1])
    result: Values = None
    if least is not None and all(value is not None for value in values):
        known = [value for value in values if value is not None]
        if instruction.opcode == "VIADDMNMX":
            known = [known[0] + known[1] & _MASK, known[2]]
        unsigned = "U32" in instruction.modifiers
        # With the sign bit inverted, signed numbers are in the order of unsigned ones.
        flip = np.uint64(0 if unsigned else 1 << 31)
        stack = np.stack(known) ^ flip
        result = np.where(least != 0, stack.min(axis=0), stack.max(axis=0)) ^ flip
    registers.write(target, result, lanes)


def _permute(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, left, selector, right = instruction.operands
    a, chosen, b = registers.read(left), registers.read(selector), registers.read(right)
    result: Values = None
    if a is not None and chosen is not None and b is not None:
        pool = a | b << _U32
        result = np.zeros(LANES, np.uint64)
        for byte in range(4):
            pick = chosen >> np.uint64(4 * byte) & np.uint64(15)
            value = pool >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(value & np.uint64(128) != 0, np.uint64(255), np.uint64(0))
            value = np.where(pick & np.uint64(8) != 0, sign, value)
            result |= value << np.uint64(8 * byte)
    registers.write(target, result, lanes)


def _move(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, source = instruction.operands[:2]
    registers.write(target, registers.read(source), lanes)


def _absolute(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    value = registers.read(instruction.operands[1])
    result = None if value is None else np.abs(_signed(value)).astype(np.uint64)
    registers.write(instruction.operands[0], result, lanes)


def _special(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, source = instruction.operands
    if instruction.opcode == "CS2R" and source == "SRZ":
        zero = np.zeros(LANES, np.uint64)
        registers.write(target, zero, lanes)
        if "32" not in instruction.modifiers:
            registers.write(target, zero, lanes, 1)
        return
    registers.write(target, registers.special.get(source), lanes)


def _constant(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    target, source = instruction.operands
    sizes = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}
    nbytes = next((sizes[name] for name in instruction.modifiers if name in sizes), 4)
    if nbytes > 8:
        for word in range(nbytes // 4):
            registers.write(target, None, lanes, word)
    elif nbytes == 8:
        registers.write_wide(target, registers.read_constant(source, 8), lanes)
    else:
        registers.write(target, registers.read_constant(source, nbytes), lanes)


def _float(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    """The floating-point steps of an integer division: its result is corrected by integers afterwards."""
    value = registers.read(instruction.operands[1])
    result: Values = None
    modifiers = instruction.modifiers
    if value is not None:
        bits = value.astype(np.uint32)
        with np.errstate(all="ignore"):
            if instruction.opcode == "I2F" and "U64" not in modifiers and "S64" not in modifiers:
                number = value.astype(np.float64) if "U32" in modifiers else _signed(value).astype(np.float64)
                result = number.astype(np.float32).view(np.uint32).astype(np.uint64)
            elif instruction.opcode == "MUFU" and "RCP" in modifiers:
                result = (np.float32(1) / bits.view(np.float32)).view(np.uint32).astype(np.uint64)
            elif instruction.opcode == "F2I" and "U32" in modifiers:
                number = np.nan_to_num(bits.view(np.float32).astype(np.float64), posinf=2.0**32 - 1)
                result = np.clip(number, 0, 2.0**32 - 1).astype(np.uint64)
    registers.write(instruction.operands[0], result, lanes)


def _pack(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    """Predicates into the bits of a register that a mask names."""
    target, _, rest, text = instruction.operands
    mask, base = int(text, 16), registers.read(rest)
    result = None if base is None else base & ~np.uint64(mask)
    for bit in range(7):
        if mask >> bit & 1:
            value = registers.predicate(f"P{bit}")
            known = result is not None and value is not None
            result = result | value << np.uint64(bit) if known else None  # type: ignore[operator]
    registers.write(target, result, lanes)


def _unpack(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    """Predicates from the bits of a register."""
    _, source, text = instruction.operands
    value = registers.read(source)
    for bit in range(7):
        if int(text, 16) >> bit & 1:
            found = None if value is None else value >> np.uint64(bit) & np.uint64(1)
            registers.write_predicate(f"P{bit}", found, lanes)


_KNOWN: dict[str, Callable[[Instruction, Registers, Values], None]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD", "IADD"), _sum),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("ISETP", "UISETP"), _compare),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicates),
    **dict.fromkeys(("SEL", "USEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX", "UVIMNMX", "VIADDMNMX", "VIMNMX3"), _least),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _move),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), _constant),
    **dict.fromkeys(("I2F", "MUFU", "F2I"), _float),
    "IABS": _absolute,
    "P2R": _pack,
    "R2P": _unpack,
}

#: Instructions that write no register.
_NOTHING = frozenset(
    (
        *("STG", "STS", "ST", "RED", "REDG", "CCTL", "LDGSTS", "MEMBAR", "ERRBAR", "FENCE"),
        *("BAR", "WARPSYNC", "ENDCOLLECTIVE", "DEPBAR", "LDGDEPBAR", "UCGABAR_ARV", "UCGABAR_WAIT"),
        *("ACQBULK", "PREEXIT", "NOP", "YIELD", "NANOSLEEP"),
    )
)


def execute(instruction: Instruction, registers: Registers, lanes: Values) -> None:
    """Carry out an instruction that is no branch, in the lanes of a mask."""
    if instruction.opcode in _NOTHING:
        return
    known = _KNOWN.get(instruction.opcode)
    if known is not None:
        known(instruction, registers, lanes)
        return
    operands = list(instruction.operands)
    while operands and _PREDICATE.match(operands[0]):
        registers.write_predicate(operands.pop(0), None, lanes)
    if not operands:
        return
    width = (
        4
        if "MMA" in instruction.opcode or "128" in instruction.modifiers
        else 2
        if _is_wide(instruction)
        else 1
    )
    for word in range(width):
        registers.write(operands[0], None, lanes, word)


def _is_wide(instruction: Instruction) -> bool:
    wide = ("64", "WIDE", "F64", "U64", "S64")
    return instruction.opcode in ("DADD", "DMUL", "DFMA") or any(
        name in wide for name in instruction.modifiers
    )
