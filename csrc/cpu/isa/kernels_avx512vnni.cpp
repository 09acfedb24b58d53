// Lookup kernels for AVX-512 with VNNI and BITALG (Ice Lake, Zen 4 and newer). Built with flags of its own
// and reached only after detect_features(). The kernels on the portable layout are those of
// kernels_avx512.cpp.
#include <immintrin.h>

#include <cstring>
#include <initializer_list>

#include "cpu/kernels.h"
#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {
namespace {

// clang-format off: the order matters
#include "cpu/isa/vec_avx512.h"
#include "cpu/isa/elementwise_body.h"
#include "cpu/isa/exponential_body.h"
#include "cpu/isa/fused_body.h"
#include "cpu/prepacked/lookup/body.h"
#include "cpu/prepacked/lookup/avx512_body.h"
// clang-format on

}  // namespace

const LookupKernels kAvx512VnniLookup = kLookup;

}  // namespace lb2::cpu
