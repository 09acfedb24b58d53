// The compiled decode kernels, by activation mode and token tile.
#pragma once

#include "cuda/decode/plain_params.h"
#include "cuda/decode/sizes.h"

namespace lb2::cuda {

using Kernel = void (*)(const DecodeParams);
using PlainKernel = void (*)(const PlainParams);

struct Kernels {
  Kernel decode;
  Kernel convert;  // NULL for tiles that blocks convert themselves
  // The same with Extras.
  Kernel decode_extended, convert_extended;
  // For plain calls (plain_params.h), by whether the input has 16 bits.
  PlainKernel plain[2];
};

// Each defined in its own file, so that they compile side by side. NULLs for a tile that is none of
// kTokenTiles.
Kernels kernels_exact(int token_tile) noexcept;
Kernels kernels_float16(int token_tile) noexcept;
Kernels kernels_int16(int token_tile) noexcept;
Kernels kernels_int8(int token_tile) noexcept;
Kernels kernels_sign(int token_tile) noexcept;

inline Kernels find_kernels(lb2_activation activation, int token_tile) noexcept {
  switch (activation) {
    case LB2_ACTIVATION_EXACT:
      return kernels_exact(token_tile);
    case LB2_ACTIVATION_FLOAT16:
      return kernels_float16(token_tile);
    case LB2_ACTIVATION_INT16:
      return kernels_int16(token_tile);
    case LB2_ACTIVATION_INT8:
      return kernels_int8(token_tile);
    case LB2_ACTIVATION_SIGN:
      return kernels_sign(token_tile);
    default:
      return {};
  }
}

}  // namespace lb2::cuda
