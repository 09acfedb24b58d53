// The decode instances of one mode; included by the decode_<mode>.cu files and, on the host, by tests.
#pragma once

#include "cuda/decode/decode.h"
#include "cuda/decode/kernels.h"
#include "cuda/decode/plain.h"

namespace lb2::cuda {

template <typename Mma, int kTokens>
Kernels kernels_of() noexcept {
  Kernels kernels = {decode<Mma, kTokens>,
                     nullptr,
                     decode_extended<Mma, kTokens>,
                     nullptr,
                     {decode_plain<Mma, kTokens, false>, decode_plain<Mma, kTokens, true>}};
  if constexpr (converts_ahead(kTokens)) {
    kernels.convert = convert<Mma, kTokens>;
    kernels.convert_extended = convert_extended<Mma, kTokens>;
  }
  return kernels;
}

template <typename Mma>
Kernels kernel_instances(int token_tile) noexcept {
  switch (token_tile) {
    case 1:
      return kernels_of<Mma, 1>();
    case 2:
      return kernels_of<Mma, 2>();
    case 4:
      return kernels_of<Mma, 4>();
    case 8:
      return kernels_of<Mma, 8>();
    case kMaxTokenTile:
      return kernels_of<Mma, kMaxTokenTile>();
    default:
      return {};
  }
}

}  // namespace lb2::cuda
