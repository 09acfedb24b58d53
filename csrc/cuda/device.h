// The one header with CUDA intrinsics and PTX. With LB2_CUDA_ON_HOST the same functions come from a shim that
// executes kernels on the host (tests/cpp/cuda_host), so everything that includes this is plain C++ besides.
//
// Fragments of the MMAs are as in the PTX ISA, "Matrix Fragments for mma.m16n8k256" (.b1), "... for
// mma.m16n8k16 with floating point type" (.f16) and "... for mma.m16n8k32" (.s8); g = lane / 4, t = lane % 4:
//   A, 4 registers: rows g, g + 8, g, g + 8; .b1: bits k = 32 t .. 32 t + 31, the last two 128 further; .f16:
//      k = 2 t, 2 t + 1, the last two 8 further; .s8: k = 4 t .. 4 t + 3, the last two 16 further.
//   B, 2 registers: column g, the same k, the second 128, 8 or 16 further.
//   C, 4 numbers: row g, columns 2 t and 2 t + 1; row g + 8, the same columns.
#pragma once

#ifdef LB2_CUDA_ON_HOST
#include "cuda_host/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define LB2_DEVICE __device__ __forceinline__
#define LB2_HOST_DEVICE __host__ __device__ __forceinline__
// Threads of a block and, where it should be given, the least number of blocks on an SM.
#define LB2_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define LB2_GRID_CONSTANT __grid_constant__

namespace lb2::cuda {

// Whether the compiler makes integer instructions of 1-bit MMAs (seen in the machine code of CUDA 13.0).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kOneBitEmulated = true;
#else
constexpr bool kOneBitEmulated = false;
#endif

struct alignas(16) Words4 {
  uint32_t w[4];
};

LB2_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
LB2_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
LB2_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
LB2_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// The block's dynamic shared memory.
LB2_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char lb2_shared[];
  return lb2_shared;
}

LB2_DEVICE void sync_block() { __syncthreads(); }
LB2_DEVICE void sync_warp() { __syncwarp(); }

// Clusters (sm_90): all threads of the cluster's blocks; and what `own`, in the block's shared memory, is in
// that of block `rank`, to be read and written as any memory. A block must not end while another may look
// into its memory. Kernels for older GPUs are never launched with clusters.
LB2_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
LB2_DEVICE void* shared_of_block(void* own, int rank) {
#if __CUDA_ARCH__ >= 900
  void* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return other;
#else
  return own;
#endif
}

// All 32 lanes take part.
LB2_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
LB2_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// Over the lanes of a warp, to all of them.
LB2_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xFFFFFFFFu, value); }
LB2_DEVICE int32_t warp_sum(int32_t value) { return __reduce_add_sync(0xFFFFFFFFu, value); }

LB2_DEVICE int popcount(uint32_t word) { return __popc(word); }
LB2_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
LB2_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
// a / b to 2 ulp, for b between 2^-126 and 2^126.
LB2_DEVICE float fast_divide(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
LB2_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// a * b, never part of a fused operation.
LB2_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

LB2_DEVICE float reciprocal_root(float value) { return __frsqrt_rn(value); }
LB2_DEVICE float exponential(float value) { return expf(value); }
LB2_DEVICE float error_function(float value) { return erff(value); }
LB2_DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }

LB2_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
LB2_DEVICE float bfloat_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
LB2_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
LB2_DEVICE uint16_t float_to_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// Weights are read once: 16 bytes at a multiple of 16, past the L1 cache; or 4 bytes, which leave their
// neighbors in it. These are no loads of constant data (ld.global.nc): the compiler moves those up past the
// wait for the kernel before, which may have written the weights.
LB2_DEVICE Words4 load_stream(const uint32_t* p) {
  Words4 r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
               : "l"(p)
               : "memory");
  return r;
}
LB2_DEVICE uint32_t load_stream_word(const uint32_t* p) {
  uint32_t r;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
LB2_DEVICE float load_stream_float(const float* p) {
  float r;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(r) : "l"(p) : "memory");
  return r;
}
// 16 bytes likewise; zeros, and nothing read, if not `inside`. The predicate is written out, as a choice
// between two values makes the compiler wait for the load.
LB2_DEVICE Words4 load_stream(const uint32_t* p, bool inside) {
  Words4 r;
  asm volatile(
      "{\n\t.reg .pred inside;\n\tsetp.ne.s32 inside, %5, 0;\n\t"
      "mov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\tmov.u32 %3, 0;\n\t"
      "@inside ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(r.w[0]), "=&r"(r.w[1]), "=&r"(r.w[2]), "=&r"(r.w[3])
      : "l"(p), "r"(static_cast<int>(inside))
      : "memory");
  return r;
}
// The first `count` words of four in place of what `words` has, one by one.
LB2_DEVICE void load_stream_words(const uint32_t* p, int count, Words4& words) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile(
        "{\n\t.reg .pred inside;\n\tsetp.gt.s32 inside, %2, 0;\n\t"
        "@inside ld.global.u32 %0, [%1];\n\t}"
        : "+r"(words.w[i])
        : "l"(p + i), "r"(count - i)
        : "memory");
}

// 16 bytes of shared or global memory, at a multiple of 16.
LB2_DEVICE Words4 load_words4(const void* p) { return *static_cast<const Words4*>(p); }

// Into the L2 cache.
LB2_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 16 bytes from global to shared memory, both at multiples of 16, done after wait_for_copies of the same
// thread.
LB2_DEVICE void copy_words4(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
// 4 bytes likewise, at multiples of 4; zero, and nothing read, if not `inside`.
LB2_DEVICE void copy_word(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 4 : 0)
               : "memory");
}
// The thread's copies since the last commit become a group; wait until at most `kGroups` of its groups are
// under way.
LB2_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
LB2_DEVICE void wait_for_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
LB2_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// c += popcount(a & b), m16n8k256.
LB2_DEVICE void mma_b1_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b, m16n8k16, float16 into float32.
LB2_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b, m16n8k32, int8 into int32.
LB2_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Bits `bit` and `bit` + 16 of a word of signs as two float16, 1 is -1.0: a shift and (a & b) | c, one LOP3.
// It is written out as the compiler makes it two, which take both constants as immediates.
LB2_DEVICE uint32_t sign_pair_f16(uint32_t word, int bit) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
      : "=r"(r)
      : "r"(word << (15 - bit)), "r"(0x80008000u), "r"(0x3C003C00u));
  return r;
}

// Programmatic dependent launch: wait for what the kernel before this one in the stream wrote, and let the
// next one start. Nothing where there is no such thing, or the kernel was launched the usual way.
LB2_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
LB2_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace lb2::cuda

#endif
