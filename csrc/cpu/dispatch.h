// Chooses the instruction set: the one requested, else the one of LB2_CPU_ISA, else the best that can run.
#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/kernels.h"
#include "cpu/prepacked/tiles/kernels.h"

namespace lb2::cpu {

// The kernels of one instruction set.
struct IsaKernels {
  lb2_isa isa;
  const Kernels* portable;      // on the portable layout
  const LookupKernels* lookup;  // on the prepacked layout
  const AttentionKernels* attention;
  const TileKernels* tiles = nullptr;  // on the prepacked layout, for many tokens
};

// Sets *kernels to those for `requested` (LB2_ISA_AUTO resolves as lb2_cpu_isa documents).
lb2_status find_kernels(lb2_isa requested, const IsaKernels** kernels) noexcept;

}  // namespace lb2::cpu
