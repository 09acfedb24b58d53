"""Walking small programs whose control bits, branches and addresses are written down here."""

from __future__ import annotations

import re
import struct

import pytest

from benchmarks.sass.block import BARRIER, parameter_base, walk_block
from benchmarks.sass.encoding import NO_SCOREBOARD, Control, Instruction
from benchmarks.sass.warp import LATENCIES

ARCH = 90
BASE = parameter_base(ARCH)


def program(*lines: str) -> tuple[Instruction, ...]:
    """Instructions from "stall=4 write=0 waits=1 | @P0 BRA 0x20"; what is left out is 1 and none."""
    code = []
    for index, line in enumerate(lines):
        head, _, text = line.rpartition("|")
        fields = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", head)}
        control = Control(
            stall=fields.get("stall", 1),
            yields=False,
            write=fields.get("write", NO_SCOREBOARD),
            read=fields.get("read", NO_SCOREBOARD),
            waits=sum(1 << int(digit) for digit in str(fields["waits"])) if "waits" in fields else 0,
        )
        guard, text = text.strip().split(" ", 1) if text.strip().startswith("@") else ("", text.strip())
        name, _, rest = text.partition(" ")
        operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
        code.append(Instruction(16 * index, guard, name, operands, control))
    return tuple(code)


def cycles_of(*lines: str, params: bytes = b"", threads: int = 32, block: int = 0) -> tuple[int, ...]:
    return walk_block(program(*lines), ARCH, params, {"x": block}, threads).cycles


def test_stalls_add_up_and_phases_end_at_their_marks() -> None:
    cycles = cycles_of(
        "stall=5 | MOV R1, 0x1",
        "stall=7 | ACQBULK",
        "stall=3 | MOV R2, 0x1",
        "stall=2 | BAR.SYNC 0x0",
        "stall=4 | BMMA.168256.AND.POPC R4, R8, R12, R4",
        "stall=6 | MOV R2, 0x1",
        "stall=1 | BAR.SYNC 0x0",
        "stall=9 | MOV R2, 0x1",
        "stall=1 | EXIT",
    )
    assert cycles == (5, 7 + 3 + BARRIER, 0, 4 + 6 + BARRIER, 9 + 1)


def test_a_result_is_waited_for_where_its_scoreboard_is_named() -> None:
    load = "stall=2 write=3 | LDG.E R4, [R2.64]"
    between = ("stall=1 | MOV R5, 0x1",) * 10
    assert (
        sum(cycles_of(load, *between, "stall=1 waits=3 | MOV R6, R4", "stall=1 | EXIT"))
        == LATENCIES["L2"] + 2
    )
    assert sum(cycles_of(load, *between, "stall=1 waits=2 | MOV R6, R4", "stall=1 | EXIT")) == 2 + 10 + 1 + 1


def test_a_second_load_of_a_line_finds_it_in_the_cache_unless_it_went_past_it() -> None:
    def twice(first: str, second: str, apart: int) -> int:
        return sum(
            cycles_of(
                "stall=1 | MOV R2, 0x1000",
                "stall=1 | MOV R3, 0x0",
                f"stall=1 write=0 | {first}",
                "stall=1 waits=0 | MOV R9, R4",
                f"stall=1 write=1 | {second}",
                "stall=1 waits=1 | MOV R9, R4",
                f"stall={apart} | EXIT",
            )
        )

    cold, same_line, next_line = "LDG.E R4, [R2.64]", "LDG.E R4, [R2.64+0x40]", "LDG.E R4, [R2.64+0x80]"
    assert twice(cold, next_line, 1) - twice(cold, same_line, 1) == LATENCIES["L2"] - LATENCIES["L1"]
    assert twice("LDG.E.NA.CONSTANT R4, [R2.64]", same_line, 1) == twice(cold, next_line, 1)


def test_loads_before_the_wait_are_counted() -> None:
    load, wait = "stall=1 write=0 | LDG.E R4, [R2.64]", "stall=1 | ACQBULK"
    for lines, early in (((wait, load, load), 0), ((load, wait, load), 1), ((load, load), 2)):
        assert walk_block(program(*lines, "stall=1 | EXIT"), ARCH, b"", {}, 64).early_loads == early


def loop(*body: str) -> tuple[str, ...]:
    return (
        "stall=1 | MOV R0, RZ",
        *body,
        "stall=1 | VIADD R0, R0, 0x1",
        f"stall=1 | ISETP.GE.AND P0, PT, R0, c[0x0][{BASE:#x}], PT",
        "stall=1 | @!P0 BRA 0x10",
        "stall=1 | EXIT",
    )


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_loop_runs_as_often_as_its_parameter_says(count: int) -> None:
    cycles = cycles_of(*loop("stall=10 | FADD R4, R4, R5"), params=struct.pack("<i", count))
    assert sum(cycles) == 1 + count * 13 + 1


def test_indices_decide_what_a_block_and_a_lane_does() -> None:
    lines = (
        "stall=1 | S2R R0, SR_CTAID.X",
        "stall=1 | IMAD R1, R0, 0x3, RZ",
        "stall=1 | ISETP.EQ.AND P0, PT, R1, 0x6, PT",
        "stall=1 | @P0 BRA 0x50",
        "stall=15 | NOP",
        "stall=1 | EXIT",
    )
    assert sum(cycles_of(*lines, block=2)) == 5
    assert sum(cycles_of(*lines, block=3)) == 20


def test_lanes_that_part_take_both_ways_and_meet_again() -> None:
    lines = (
        "stall=1 | S2R R0, SR_TID.X",
        "stall=1 | BSSY B0, 0x70",
        "stall=1 | ISETP.GE.AND P0, PT, R0, 0x8, PT",
        "stall=1 | @P0 BRA 0x60",
        "stall=10 | FADD R4, R4, R5",
        "stall=1 | BRA 0x70",
        "stall=12 | FADD R6, R6, R7",
        "stall=1 | BSYNC B0",
        "stall=1 | EXIT",
    )
    # A warp of which all lanes go the same way takes one.
    assert sum(cycles_of(*lines)) == 4 + 11 + 12 + 2 * 1 + 1
    last_warp = walk_block(program(*lines), ARCH, b"", {}, 64)
    assert last_warp.instructions == 10


def test_a_barrier_is_passed_when_the_last_warp_has_arrived() -> None:
    lines = (
        "stall=1 | S2R R0, SR_TID.X",
        "stall=1 | ISETP.LT.AND P0, PT, R0, 0x20, PT",
        "stall=1 | @P0 BRA 0x40",
        "stall=15 | NOP",
        "stall=1 | BAR.SYNC 0x0",
        "stall=1 | EXIT",
    )
    assert sum(cycles_of(*lines, threads=32)) == 3 + BARRIER + 1
    assert sum(cycles_of(*lines, threads=64)) == 3 + 15 + BARRIER + 1


def test_carries_shifts_and_tables_are_those_of_the_hardware() -> None:
    """Integer arithmetic through 64 bits, as addresses are made of it: the branch is taken if it is right."""
    lines = (
        "MOV R2, 0xfffffff0",
        "MOV R3, 0x1",
        "IADD3 R4, P1, R2, 0x20, RZ",
        "IADD3.X R5, R3, RZ, RZ, P1, !PT",
        "IMAD.WIDE R6, R3, -0x2, R4",
        "SHF.R.U32.HI R8, RZ, 0x4, R6",
        "LEA R9, R8, R5, 0x3",
        "LOP3.LUT R10, R9, 0xff, R3, 0x78, !PT",
        "LEA.HI.SX32 R11, R2, R10, 0x1c",
        "SEL R12, R11, R2, P1",
        "PRMT R13, R12, 0x1000, RZ",
    )
    # R4:R5 = 0x2_00000010, R6:R7 = that - 2 = 0x2_0000000e, R8 = 0, R9 = 2, R10 = (2 & 0xff) ^ 1 = 3,
    # R11 = (-16 >> 4) + 3 = 2, R13 = its byte 0 in byte 3 (selector 0x1000: bytes 0, 0, 0 and byte 1 on top).
    check = (
        "ISETP.NE.AND P0, PT, R11, 0x2, PT",
        "ISETP.NE.OR P0, PT, R13, 0x20202, P0",
        "ISETP.NE.OR P0, PT, R5, 0x2, P0",
        f"@P0 BRA {16 * (len(lines) + 5):#x}",
        "EXIT",
        "stall=15 | EXIT",
    )
    assert sum(cycles_of(*lines, *check)) == len(lines) + 5


def test_literals_are_read_from_their_own_bank() -> None:
    lines = ("ISETP.NE.AND P0, PT, R0, c[0x2][0x4], PT", "@P0 BRA 0x40", "EXIT", "NOP", "stall=15 | EXIT")
    literals = struct.pack("<ii", 5, 7)
    for value, cycles in (("0x7", 1 + 3), ("0x5", 1 + 2 + 15)):
        code = program(f"MOV R0, {value}", *(line.replace("0x40", "0x50") for line in lines))
        assert sum(walk_block(code, ARCH, b"", {}, 32, literals).cycles) == cycles


def test_predicates_are_packed_and_unpacked() -> None:
    lines = (
        "ISETP.EQ.AND P1, PT, RZ, RZ, PT",
        "ISETP.NE.AND P2, PT, RZ, RZ, PT",
        "P2R R4, PR, RZ, 0x6",
        "R2P PR, R4, 0x4",
        "ISETP.NE.AND P0, PT, R4, 0x2, P2",
        "ISETP.NE.OR P0, PT, R4, 0x2, P0",
        "@P0 BRA 0x80",
        "EXIT",
        "stall=15 | EXIT",
    )
    assert sum(cycles_of(*lines)) == 8


def test_a_branch_on_data_goes_straight_on_and_is_counted() -> None:
    lines = (
        "stall=1 write=0 | LDG.E R4, [R2.64]",
        "stall=1 waits=0 | ISETP.NE.AND P0, PT, R4, RZ, PT",
        "stall=1 | @P0 BRA 0x10",
        "stall=1 | EXIT",
    )
    path = walk_block(program(*lines), ARCH, b"", {}, 32)
    assert (path.assumed, path.instructions) == (1, 4)


def test_a_loop_that_does_not_end_is_refused() -> None:
    with pytest.raises(ValueError, match="must end within"):
        cycles_of("stall=1 | BRA 0x0")
