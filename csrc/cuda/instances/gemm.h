// The GEMM's instances of one mode; included by the gemm_<mode>.cu files and, on the host, by tests.
#pragma once

#include "cuda/gemm/gemm.h"
#include "cuda/gemm/kernels.h"

namespace lb2::cuda {

template <typename Operand, int kTile = 0>
GemmKernel gemm_instance(int rows, int tokens) noexcept {
  if (rows == 0) return gemm_convert<Operand>;
  if constexpr (kTile < sizeof kGemmTiles / sizeof *kGemmTiles) {
    constexpr GemmTile tile = kGemmTiles[kTile];
    if constexpr (has_gemm_tile(Operand::kActivation, tile.rows, tile.tokens))
      if (rows == tile.rows && tokens == tile.tokens) return gemm<Operand, GemmShape<tile.rows, tile.tokens>>;
    return gemm_instance<Operand, kTile + 1>(rows, tokens);
  } else {
    return nullptr;
  }
}

}  // namespace lb2::cuda
