// Choice of the instruction set: what was asked for, what LB2_CPU_ISA says, what the machine can run.
#pragma once

#include "cpu/kernels.h"

namespace lb2::cpu {

// Sets *kernels to the table for `requested` (LB2_ISA_AUTO resolves as lb2_cpu_isa documents).
lb2_status find_kernels(lb2_isa requested, const Kernels** kernels) noexcept;

}  // namespace lb2::cpu
