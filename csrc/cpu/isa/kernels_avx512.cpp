// AVX-512 (F, BW, DQ, VL) kernels. Built with flags of its own and reached only after detect_features().
#include <immintrin.h>

#include <cstring>
#include <initializer_list>

#include "cpu/attention/kernels.h"
#include "cpu/kernels.h"
#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {
namespace {

#include "cpu/isa/vec_avx512.h"

// 32 zmm registers: 16 rows x 1 token, or 4 rows x 6 tokens, plus signs, operands and the constants +1 and
// -1.
constexpr int kDotRows1 = 16;
constexpr int kDotRows = 4;
constexpr int kDotTokens = 6;
constexpr int kSumTokens = 8;
constexpr int kInt8Tokens = 6;
constexpr int kScoreRows = 4;
constexpr int kScoreKeys1 = 8;
constexpr int kScoreKeys = 4;
constexpr int kValueVecs = 4;

// clang-format off: the order matters
#include "cpu/isa/elementwise_body.h"
#include "cpu/isa/exponential_body.h"
#include "cpu/isa/fused_body.h"
#include "cpu/portable/kernel_body.h"
#include "cpu/int8/int8_body.h"
#include "cpu/attention/attention_body.h"
#include "cpu/prepacked/lookup/body.h"
#include "cpu/prepacked/lookup/avx512_body.h"
// clang-format on

}  // namespace

const Kernels kAvx512Kernels = {load_scaled, sign_dots, sign_sums, store, load_padded, int8_dots};
const LookupKernels kAvx512Lookup = kLookup;
const AttentionKernels kAvx512Attention = kAttention;

}  // namespace lb2::cpu
