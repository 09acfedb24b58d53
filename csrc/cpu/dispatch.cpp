#include "cpu/dispatch.h"

#include <atomic>
#include <cinttypes>
#include <cstdlib>
#include <cstring>

#include "core/status.h"
#include "cpu/features.h"

namespace lb2::cpu {
namespace {

constexpr const char* kIsaNames[] = {"auto", "scalar", "avx2", "avx512", "avx512vnni", "neon", "amx"};
constexpr lb2_isa kIsaCount = sizeof kIsaNames / sizeof kIsaNames[0];

constexpr IsaKernels kScalar = {LB2_ISA_SCALAR, &kScalarKernels, &kScalarLookup, &kScalarAttention};
#if defined(LB2_HAVE_AVX2)
constexpr IsaKernels kAvx2 = {LB2_ISA_AVX2, &kAvx2Kernels, &kAvx2Lookup, &kAvx2Attention};
#endif
#if defined(LB2_HAVE_AVX512)
constexpr IsaKernels kAvx512 = {LB2_ISA_AVX512, &kAvx512Kernels, &kAvx512Lookup, &kAvx512Attention};
constexpr IsaKernels kAvx512Vnni = {LB2_ISA_AVX512_VNNI, &kAvx512Kernels, &kAvx512VnniLookup,
                                    &kAvx512Attention};
#endif
#if defined(LB2_HAVE_AMX)
constexpr IsaKernels kAmx = {LB2_ISA_AMX, &kAvx512Kernels, &kAvx512VnniLookup, &kAvx512Attention,
                             &kAmxTileKernels};
#endif
#if defined(LB2_HAVE_NEON)
constexpr IsaKernels kNeon = {LB2_ISA_NEON, &kNeonKernels, &kNeonLookup, &kNeonAttention};
#endif

#if defined(LB2_EMULATE_AMX)
const IsaKernels* available_kernels(lb2_isa isa);

// Tests: tiles on arrays, and what the best instruction set of this machine has beside them.
const IsaKernels* emulated_kernels() {
  static const IsaKernels kernels = [] {
    lb2_isa isa = LB2_ISA_AMX - 1;
    while (available_kernels(isa) == nullptr) --isa;
    IsaKernels best = *available_kernels(isa);
    best.isa = LB2_ISA_AMX;
    best.tiles = &kAmxTileKernels;
    return best;
  }();
  return &kernels;
}
#endif

// nullptr when the instruction set was not built in or cannot run here.
const IsaKernels* available_kernels(lb2_isa isa) {
  static const Features features = detect_features();
  switch (isa) {
    case LB2_ISA_SCALAR:
      return &kScalar;
#if defined(LB2_HAVE_AVX2)
    case LB2_ISA_AVX2:
      return features.avx2 ? &kAvx2 : nullptr;
#endif
#if defined(LB2_HAVE_AVX512)
    case LB2_ISA_AVX512:
      return features.avx512 ? &kAvx512 : nullptr;
    case LB2_ISA_AVX512_VNNI:
      return features.avx512_vnni ? &kAvx512Vnni : nullptr;
#endif
#if defined(LB2_HAVE_NEON)
    case LB2_ISA_NEON:
      return features.neon ? &kNeon : nullptr;
#endif
#if defined(LB2_EMULATE_AMX)
    case LB2_ISA_AMX:
      return emulated_kernels();
#elif defined(LB2_HAVE_AMX)
    case LB2_ISA_AMX: {
      // Once for the process, where they are to be used or somebody asks whether they can be.
      static const bool permitted = features.amx && request_tiles();
      return permitted ? &kAmx : nullptr;
    }
#endif
    default:
      (void)features;
      return nullptr;
  }
}

lb2_status require(lb2_isa isa, const char* source, const IsaKernels** kernels) {
  if (isa <= LB2_ISA_AUTO || isa >= kIsaCount)
    return fail(
        LB2_ERROR_INVALID_ARGUMENT,
        "%s must be LB2_ISA_SCALAR (1), LB2_ISA_AVX2 (2), LB2_ISA_AVX512 (3), LB2_ISA_AVX512_VNNI (4), "
        "LB2_ISA_NEON (5) or LB2_ISA_AMX (6), got %" PRId32,
        source, isa);
  *kernels = available_kernels(isa);
  if (*kernels == nullptr)
    return fail(LB2_ERROR_UNSUPPORTED, "%s asks for the %s kernels, which this %s cannot run", source,
                kIsaNames[isa], isa == LB2_ISA_SCALAR ? "build" : "CPU, operating system or build");
  return LB2_OK;
}

// AMX must be asked for: its kernels have not been run and measured on hardware yet.
const IsaKernels* best_kernels() {
  for (lb2_isa isa = kIsaCount - 1; isa > LB2_ISA_SCALAR; --isa)
    if (isa != LB2_ISA_AMX)
      if (const IsaKernels* kernels = available_kernels(isa)) return kernels;
  return &kScalar;
}

std::atomic<lb2_isa> process_isa{LB2_ISA_AUTO};

// The instruction set that LB2_CPU_ISA names; kIsaCount when it names none.
struct EnvironmentChoice {
  lb2_isa isa = LB2_ISA_AUTO;
  char value[64] = "";

  EnvironmentChoice() {
    const char* text = std::getenv("LB2_CPU_ISA");
    if (text == nullptr || *text == '\0') return;
    std::strncpy(value, text, sizeof value - 1);
    while (isa < kIsaCount && std::strcmp(text, kIsaNames[isa]) != 0) ++isa;
  }
};

lb2_status kernels_from_environment(const IsaKernels** kernels) {
  // Read once, so that a later change of the environment cannot switch kernels in mid-run.
  static const EnvironmentChoice choice;
  static const IsaKernels* const best = best_kernels();
  if (choice.isa == kIsaCount)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "the environment variable LB2_CPU_ISA must be auto, scalar, avx2, avx512, avx512vnni, "
                "neon or amx, got \"%s\"",
                choice.value);
  if (choice.isa != LB2_ISA_AUTO) return require(choice.isa, "the environment variable LB2_CPU_ISA", kernels);
  *kernels = best;
  return LB2_OK;
}

}  // namespace

lb2_status find_kernels(lb2_isa requested, const IsaKernels** kernels) noexcept {
  if (requested != LB2_ISA_AUTO) return require(requested, "isa", kernels);
  const lb2_isa chosen = process_isa.load(std::memory_order_relaxed);
  if (chosen != LB2_ISA_AUTO) return require(chosen, "isa", kernels);
  return kernels_from_environment(kernels);
}

}  // namespace lb2::cpu

using lb2::cpu::find_kernels;
using lb2::cpu::IsaKernels;

extern "C" lb2_status lb2_cpu_isa(lb2_isa* isa) {
  if (isa == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "isa must not be NULL");
  const IsaKernels* kernels;
  LB2_RETURN_IF_ERROR(find_kernels(LB2_ISA_AUTO, &kernels));
  *isa = kernels->isa;
  return LB2_OK;
}

extern "C" lb2_status lb2_cpu_set_isa(lb2_isa isa) {
  const IsaKernels* kernels;
  if (isa != LB2_ISA_AUTO) LB2_RETURN_IF_ERROR(find_kernels(isa, &kernels));
  lb2::cpu::process_isa.store(isa, std::memory_order_relaxed);
  return LB2_OK;
}

extern "C" int32_t lb2_cpu_isa_available(lb2_isa isa) { return lb2::cpu::available_kernels(isa) != nullptr; }

extern "C" const char* lb2_isa_name(lb2_isa isa) {
  return isa >= LB2_ISA_AUTO && isa < lb2::cpu::kIsaCount ? lb2::cpu::kIsaNames[isa] : "unknown";
}
