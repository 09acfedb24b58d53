// Kernels on tiles for AMX (Sapphire Rapids and newer), which also have AVX-512 with VBMI and VNNI. Built
// with flags of its own and reached only after detect_features(). LB2_EMULATE_AMX takes the instructions from
// the tests instead.
#include <cstring>

#if defined(LB2_EMULATE_AMX)
#include <cstdio>
#include <cstdlib>

#include "amx_host/tiles.h"
#endif
#if !defined(LB2_EMULATE_AMX) || defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/prepacked/tiles/kernels.h"

namespace lb2::cpu {
namespace {

// clang-format off: the order matters
#include "cpu/isa/tree_body.h"
#include "cpu/prepacked/lookup/scale_body.h"
#include "cpu/prepacked/tiles/body.h"
#if defined(LB2_EMULATE_AMX)
#include "amx_host/instructions.h"
#else
#include "cpu/prepacked/tiles/instructions.h"
#endif
#if !defined(LB2_EMULATE_AMX) || defined(__AVX512VBMI__)
#include "cpu/prepacked/tiles/bytes_avx512.h"
#else
#include "cpu/prepacked/word.h"
#include "amx_host/bytes.h"
#endif
#include "cpu/prepacked/tiles/tiles_body.h"
// clang-format on

}  // namespace

const TileKernels kAmxTileKernels = {tile_mode<2>(), tile_mode<1>()};

}  // namespace lb2::cpu
