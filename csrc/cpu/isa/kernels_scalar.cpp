// Portable kernels: plain C++ that runs on any little-endian CPU; compilers vectorize the 16-lane loops.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {
namespace {

#include "cpu/isa/vec_scalar.h"

constexpr int kDotRows1 = 2;
constexpr int kDotRows = 2;
constexpr int kDotTokens = 2;
constexpr int kSumTokens = 1;

// clang-format off: the order matters
#include "cpu/isa/elementwise_body.h"
#include "cpu/portable/kernel_body.h"
#include "cpu/prepacked/lookup_body.h"
#include "cpu/prepacked/lookup_scalar_body.h"
// clang-format on

}  // namespace

const Kernels kScalarKernels = {load_scaled, sign_dots, sign_sums, store};
const LookupKernels kScalarLookup = kLookup;

}  // namespace lb2::cpu
