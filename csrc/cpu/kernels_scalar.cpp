// Portable kernels: plain C++ that runs on any little-endian CPU; compilers vectorise the 16-lane loops.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/lookup.h"

namespace lb2::cpu {
namespace {

#include "cpu/vec_scalar.h"

constexpr int kDotRows1 = 2;
constexpr int kDotRows = 2;
constexpr int kDotTokens = 2;
constexpr int kSumTokens = 1;

// clang-format off: the order matters
#include "cpu/elementwise_body.h"
#include "cpu/kernel_body.h"
#include "cpu/lookup_body.h"
#include "cpu/lookup_scalar_body.h"
// clang-format on

}  // namespace

const Kernels kScalarKernels = {load_scaled, sign_dots, sign_sums, store};
const LookupKernels kScalarLookup = kLookup;

}  // namespace lb2::cpu
