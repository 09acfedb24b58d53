// Portable kernels: plain C++ that runs on any little-endian CPU; compilers vectorize the 16-lane loops.
#include <cstring>
#include <initializer_list>

#include "cpu/attention/kernels.h"
#include "cpu/kernels.h"
#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {
namespace {

#include "cpu/isa/vec_scalar.h"

constexpr int kDotRows1 = 2;
constexpr int kDotRows = 2;
constexpr int kDotTokens = 2;
constexpr int kSumTokens = 1;
constexpr int kInt8Tokens = 1;
constexpr int kScoreRows = 2;
constexpr int kScoreKeys1 = 2;
constexpr int kScoreKeys = 2;
constexpr int kValueVecs = 2;

// clang-format off: the order matters
#include "cpu/isa/elementwise_body.h"
#include "cpu/isa/exponential_body.h"
#include "cpu/isa/fused_body.h"
#include "cpu/portable/kernel_body.h"
#include "cpu/int8/int8_body.h"
#include "cpu/attention/attention_body.h"
#include "cpu/prepacked/word.h"
#include "cpu/prepacked/lookup/body.h"
#include "cpu/prepacked/lookup/scalar_body.h"
// clang-format on

}  // namespace

const Kernels kScalarKernels = {load_scaled, sign_dots, sign_sums, store, load_padded, int8_dots};
const LookupKernels kScalarLookup = kLookup;
const AttentionKernels kScalarAttention = kAttention;

}  // namespace lb2::cpu
