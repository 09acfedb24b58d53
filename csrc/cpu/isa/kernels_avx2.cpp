// AVX2 + FMA + F16C kernels. Built with flags of its own and reached only after detect_features().
#include <immintrin.h>

#include <cstring>
#include <initializer_list>

#include "cpu/attention/kernels.h"
#include "cpu/kernels.h"
#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {
namespace {

#include "cpu/isa/vec_avx2.h"

// 16 ymm registers: 4 rows x 1 token or 2 rows x 3 tokens of two-register sums, plus signs and operands.
constexpr int kDotRows1 = 4;
constexpr int kDotRows = 2;
constexpr int kDotTokens = 3;
constexpr int kSumTokens = 3;
constexpr int kInt8Tokens = 1;
constexpr int kScoreRows = 2;
constexpr int kScoreKeys1 = 4;
constexpr int kScoreKeys = 2;
constexpr int kValueVecs = 2;

// clang-format off: the order matters
#include "cpu/isa/elementwise_body.h"
#include "cpu/isa/exponential_body.h"
#include "cpu/isa/fused_body.h"
#include "cpu/portable/kernel_body.h"
#include "cpu/int8/int8_body.h"
#include "cpu/attention/attention_body.h"
#include "cpu/prepacked/lookup/body.h"
#include "cpu/prepacked/lookup/vec_body.h"
#include "cpu/prepacked/lookup/avx2_body.h"
// clang-format on

}  // namespace

const Kernels kAvx2Kernels = {load_scaled, sign_dots, sign_sums, store, load_padded, int8_dots};
const LookupKernels kAvx2Lookup = kLookup;
const AttentionKernels kAvx2Attention = kAttention;

}  // namespace lb2::cpu
