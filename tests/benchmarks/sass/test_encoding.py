"""Control bits of instructions, from lines that cuobjdump printed."""

from __future__ import annotations

from benchmarks.sass.encoding import NO_SCOREBOARD, Control, decode_control, parse_functions

# sm_90, nvcc 13.0: a load of a parameter without a scoreboard to wait for, one that holds scoreboard 0, an
# instruction that waits for it, and a guarded one.
LISTING = """
	code for sm_90
		Function : first
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ; /* 0x00000a00ff017b82 */
                   /* 0x000ff00000000800 */
        /*0010*/                   LDC R10, c[0x0][0x930] ; /* 0x00024c00ff0a7b82 */
                   /* 0x000e220000000800 */
        /*0060*/                   IABS R8, R10 ; /* 0x0000000a00087213 */
                   /* 0x001fc40000000000 */
        /*00b0*/              @!P2 SHF.R.S32.HI R3, RZ, 0x5, R2 ; /* 0x00000005ff037819 */
                   /* 0x000fe20000011402 */
		..........

		Function : second
        /*0000*/                   EXIT ; /* 0x000000000000794d */
                   /* 0x000fea0003800000 */
"""


def test_listing_gives_functions_instructions_and_control_bits() -> None:
    functions = dict(parse_functions(LISTING))
    assert list(functions) == ["first", "second"]
    load, held, waiting, guarded = functions["first"]
    assert (load.name, load.operands) == ("LDC", ("R1", "c[0x0][0x28]"))
    assert load.control == Control(stall=8, yields=False, write=NO_SCOREBOARD, read=NO_SCOREBOARD, waits=0)
    assert held.address == 0x10
    assert held.control == Control(stall=1, yields=False, write=0, read=NO_SCOREBOARD, waits=0)
    assert (waiting.control.waits, waiting.control.stall) == (1, 2)
    assert (guarded.guard, guarded.opcode, guarded.modifiers) == ("@!P2", "SHF", ("R", "S32", "HI"))
    assert functions["second"][0].opcode == "EXIT"


def test_every_field_of_the_control_bits_is_found() -> None:
    bits = 9 | 1 << 4 | 3 << 5 | 5 << 8 | 0b101001 << 11
    wanted = Control(stall=9, yields=False, write=3, read=5, waits=0b101001)
    assert decode_control(0xFFFF, bits << 41) == wanted
    assert decode_control(0, 0).yields
