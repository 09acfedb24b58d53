// Picks the instance of one mode; included by the decode_<mode>.cu files and, on the host, by tests.
#pragma once

#include "cuda/decode.h"
#include "cuda/kernels.h"

namespace lb2::cuda {

template <typename Mma>
DecodeKernel decode_instance(int token_tile) noexcept {
  switch (token_tile) {
    case 1:
      return decode<Mma, 1>;
    case 2:
      return decode<Mma, 2>;
    case 4:
      return decode<Mma, 4>;
    case 8:
      return decode<Mma, 8>;
    case kMaxTokenTile:
      return decode<Mma, kMaxTokenTile>;
    default:
      return nullptr;
  }
}

}  // namespace lb2::cuda
