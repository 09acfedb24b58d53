#include "cpu/features.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace lb2::cpu {
namespace {

constexpr uint64_t kYmmState = 0x06;  // XCR0: SSE and AVX state
constexpr uint64_t kZmmState = 0xE6;  // the above, opmask, upper halves of zmm0-15, zmm16-31
constexpr int kTileData = 18;         // the component of XCR0 that holds tiles
constexpr uint64_t kTileState = uint64_t{3} << (kTileData - 1);  // and that of their configuration

constexpr bool bit(uint32_t value, int index) { return (value >> index) & 1u; }

uint64_t enabled_state() {
  uint32_t low, high;
  // Assembly: the intrinsic would need -mxsave, and this file is built without ISA flags.
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

}  // namespace

Features detect_features() noexcept {
  Features features = {};
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return features;
  const bool os_saves_state = bit(ecx, 27);  // OSXSAVE
  const bool avx = bit(ecx, 28), fma = bit(ecx, 12), f16c = bit(ecx, 29);
  if (!os_saves_state || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const uint64_t state = enabled_state();
  features.avx2 = avx && fma && f16c && bit(ebx, 5) && (state & kYmmState) == kYmmState;
  const bool f = bit(ebx, 16), dq = bit(ebx, 17), bw = bit(ebx, 30), vl = bit(ebx, 31);
  features.avx512 = features.avx2 && f && dq && bw && vl && (state & kZmmState) == kZmmState;
  features.avx512_vnni = features.avx512 && bit(ecx, 11) && bit(ecx, 12);
  const bool vbmi = bit(ecx, 1), tiles = bit(edx, 24), tiles_int8 = bit(edx, 25);
  features.amx = features.avx512_vnni && vbmi && tiles && tiles_int8 && (state & kTileState) == kTileState;
  return features;
}

bool request_tiles() noexcept {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, which older headers lack
  return syscall(SYS_arch_prctl, kRequestPermission, static_cast<long>(kTileData)) == 0;
#else
  return false;
#endif
}

}  // namespace lb2::cpu

#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

namespace lb2::cpu {

Features detect_features() noexcept {
  Features features = {};
  features.neon = (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0;
  return features;
}

bool request_tiles() noexcept { return false; }

}  // namespace lb2::cpu

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>

namespace lb2::cpu {

Features detect_features() noexcept {
  Features features = {};
  int present = 0;
  size_t size = sizeof present;
  features.neon = sysctlbyname("hw.optional.neon", &present, &size, nullptr, 0) == 0 && present != 0;
  return features;
}

bool request_tiles() noexcept { return false; }

}  // namespace lb2::cpu

#else

namespace lb2::cpu {

Features detect_features() noexcept { return {}; }

bool request_tiles() noexcept { return false; }

}  // namespace lb2::cpu

#endif
