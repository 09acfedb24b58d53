// NEON kernels for 64-bit ARM, with what ARMv8.0 has. Every such CPU runs them.
#include <arm_neon.h>

#include <cstring>
#include <initializer_list>

#include "cpu/attention/kernels.h"
#include "cpu/kernels.h"
#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {
namespace {

#include "cpu/isa/vec_neon.h"

// 32 registers of which a vector takes four: 2 rows x 2 tokens of sums, plus signs and operands.
constexpr int kDotRows1 = 4;
constexpr int kDotRows = 2;
constexpr int kDotTokens = 2;
constexpr int kSumTokens = 2;
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
#include "cpu/prepacked/lookup/vec_body.h"
#include "cpu/prepacked/lookup/neon_body.h"
// clang-format on

}  // namespace

const Kernels kNeonKernels = {load_scaled, sign_dots, sign_sums, store, load_padded, int8_dots};
const LookupKernels kNeonLookup = kLookup;
const AttentionKernels kNeonAttention = kAttention;

}  // namespace lb2::cpu
