// The compiled instances, by activation mode and token tile.
#pragma once

#include "cuda/instances.h"

namespace lb2::cuda {

using DecodeKernel = void (*)(const StageParams);

// Each defined in its own file, so that they compile side by side. NULL for a tile that is none of
// kTokenTiles.
DecodeKernel decode_exact(int token_tile) noexcept;
DecodeKernel decode_float16(int token_tile) noexcept;
DecodeKernel decode_int16(int token_tile) noexcept;
DecodeKernel decode_int8(int token_tile) noexcept;
DecodeKernel decode_sign(int token_tile) noexcept;

inline DecodeKernel find_decode(lb2_activation activation, int token_tile) noexcept {
  switch (activation) {
    case LB2_ACTIVATION_EXACT:
      return decode_exact(token_tile);
    case LB2_ACTIVATION_FLOAT16:
      return decode_float16(token_tile);
    case LB2_ACTIVATION_INT16:
      return decode_int16(token_tile);
    case LB2_ACTIVATION_INT8:
      return decode_int8(token_tile);
    case LB2_ACTIVATION_SIGN:
      return decode_sign(token_tile);
    default:
      return nullptr;
  }
}

}  // namespace lb2::cuda
