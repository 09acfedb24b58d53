// What the CPU and the operating system can run. Compiled without ISA flags.
#pragma once

namespace lb2::cpu {

struct Features {
  bool avx2;         // AVX2, FMA and F16C, with the OS saving the upper halves of ymm
  bool avx512;       // AVX-512 F, BW, DQ and VL, with the OS saving zmm and mask registers
  bool avx512_vnni;  // the above, VNNI and BITALG
  bool amx;          // the above, AVX-512 VBMI, AMX tiles and int8, with the OS saving tiles
  bool neon;         // Advanced SIMD of 64-bit ARM
};

// x86: CPUID says what the CPU decodes, XGETBV what the OS saves on a context switch; both are needed.
// 64-bit ARM: the operating system says what programs may use.
Features detect_features() noexcept;

// Asks the operating system to let this process use the tiles of AMX. Whether it does.
bool request_tiles() noexcept;

}  // namespace lb2::cpu
