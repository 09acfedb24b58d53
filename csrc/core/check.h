// The one full argument check of the layer calls. LB2_API here and in other internal headers is for
// liblittlebit2_cuda, which shares these with the core library.
#pragma once

#include "littlebit2/littlebit2.h"

namespace lb2 {

enum class Direction { kForward, kBackward };

// Checks everything that describes the layer: sizes, dtype, paths. Data pointers are not looked at.
LB2_API lb2_status check_layer(const lb2_linear_args* args) noexcept;

// Checks input, output and workspace of a call; check_layer must have passed.
LB2_API lb2_status check_buffers(const lb2_linear_args& args, Direction direction,
                                 int64_t workspace_bytes) noexcept;

// The same for calls on a prepacked layer, whose bytes are checked where they are read.
lb2_status check_prepacked(const lb2_prepacked_args* args) noexcept;
lb2_status check_prepacked_buffers(const lb2_prepacked_args& args, int64_t k, int64_t n,
                                   int64_t workspace_bytes) noexcept;

}  // namespace lb2
