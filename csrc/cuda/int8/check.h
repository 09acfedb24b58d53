// Checks of an int8 call on a GPU; part of the core library.
#pragma once

#include "littlebit2/cuda.h"

namespace lb2::cuda {

LB2_API lb2_status check_int8_call(const lb2_int8_args* args) noexcept;

}  // namespace lb2::cuda
