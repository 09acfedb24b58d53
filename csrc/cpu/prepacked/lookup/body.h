// What the lookup kernels of all instruction sets share: scales, and register tiles run over a whole
// SignTile. Include this before lookup/<isa>_body.h, where elementwise_body.h says.

#include "cpu/prepacked/lookup/scale_body.h"

template <template <int, int> class Kernel, int kBlocks, int kTokens>
inline void run_tokens(const SignTile& tile, const Tables& tables, int64_t token, const RowSums& out) {
  int64_t block = 0;
  for (; block + kBlocks <= tile.blocks; block += kBlocks)
    Kernel<kBlocks, kTokens>::run(tile, block, tables, token, out);
  if constexpr (kBlocks > 1) {
    switch (tile.blocks - block) {
      case 3:
        if constexpr (kBlocks > 3) Kernel<3, kTokens>::run(tile, block, tables, token, out);
        break;
      case 2:
        if constexpr (kBlocks > 2) Kernel<2, kTokens>::run(tile, block, tables, token, out);
        break;
      case 1:
        Kernel<1, kTokens>::run(tile, block, tables, token, out);
        break;
    }
  }
}

template <template <int, int> class Kernel, int kOne, int kTwo, int kFour>
void run_tile(const SignTile& tile, const Tables& tables, const RowSums& out) {
  int64_t token = 0;
  if constexpr (kFour > 0)
    for (; token + 4 <= tables.tokens; token += 4) run_tokens<Kernel, kFour, 4>(tile, tables, token, out);
  if constexpr (kTwo > 0)
    for (; token + 2 <= tables.tokens; token += 2) run_tokens<Kernel, kTwo, 2>(tile, tables, token, out);
  for (; token < tables.tokens; ++token) run_tokens<Kernel, kOne, 1>(tile, tables, token, out);
}

// The kernels of an instruction set. Its own are the modes and macs_per_worker; the rest is defined before.
constexpr LookupKernels lookup_kernels(LookupMode exact, LookupMode int16, LookupMode int8, LookupMode sign,
                                       int64_t macs_per_worker) {
  return {exact,    int16,       int8,       sign,     load_scaled,  load_latents, abs_sum,        scale_rows,
          add_bias, sum_squares, scale_norm, activate, add_residual, store,        macs_per_worker};
}
