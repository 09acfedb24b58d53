/* clang-format off */
/* The C ABI of the littlebit2 kernels: plain C, no torch, no Python, no C++ in this header.
 *
 * A layer with P paths computes (M tokens, K in_features, N out_features, R rank of a path)
 *
 *   y[M,N] = sum_p out_scale[N] * ((latent_scale[R] * ((x[M,K] * in_scale[K]) @ sign(V)[R,K]^T)) @ sign(U)[N,R]^T)
 *            + bias[N]
 *
 * with the sign matrices in packed format v1 (format.h, docs/format.md). A single-stage path (OneBit-like) has no U:
 * its V is [N, K].
 *
 * Rules that hold for every function here:
 *  - it never throws, exits, aborts or prints; it returns a status and leaves a message for lb2_last_error();
 *  - it is reentrant and thread-safe; the message is per thread;
 *  - it allocates nothing that outlives the call, and nothing at all in the forward and backward calls;
 *  - pointers need no alignment; the workspace size includes room to align it.
 */
/* clang-format on */
#ifndef LITTLEBIT2_LITTLEBIT2_H_
#define LITTLEBIT2_LITTLEBIT2_H_

#include <stdint.h>

#include "littlebit2/export.h"
#include "littlebit2/format.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Status codes (int32_t, so that the ABI does not depend on the size of an enum). */
typedef int32_t lb2_status;
#define LB2_OK 0
#define LB2_ERROR_INVALID_ARGUMENT                                                                    \
  1                             /* the message names the argument, what was expected and what was got \
                                 */
#define LB2_ERROR_UNSUPPORTED 2 /* this machine or this build cannot serve the request */
#define LB2_ERROR_INTERNAL 3    /* a callback failed, or a bug */

/* Element types. Activations have one of the first three; only lb2_unpack_signs accepts LB2_INT8. */
typedef int32_t lb2_dtype;
#define LB2_FLOAT32 0
#define LB2_FLOAT16 1  /* IEEE binary16 */
#define LB2_BFLOAT16 2 /* upper half of binary32 */
#define LB2_INT8 3

/* Instruction sets of the CPU kernels. */
typedef int32_t lb2_isa;
#define LB2_ISA_AUTO 0
#define LB2_ISA_SCALAR 1      /* portable C++, any CPU */
#define LB2_ISA_AVX2 2        /* AVX2 + FMA + F16C */
#define LB2_ISA_AVX512 3      /* AVX-512 F, BW, DQ, VL */
#define LB2_ISA_AVX512_VNNI 4 /* the same with VNNI and BITALG */
#define LB2_ISA_NEON 5        /* NEON of 64-bit ARM, ARMv8.0 */
#define LB2_ISA_AMX 6         /* AVX512_VNNI with AVX-512 VBMI, and AMX int8 tiles for many tokens */

/* One path of a layer. Two paths of equal rank whose `v`, `v_stride` and `in_scale` are equal share their
 * first stage: it is computed once. */
typedef struct lb2_path {
  const int32_t* v;          /* [R, ceil(K/32)] words; [N, ceil(K/32)] for a single-stage path */
  int64_t v_stride;          /* words between rows of v, >= ceil(K/32) */
  const int32_t* u;          /* [N, ceil(R/32)] words, or NULL for a single-stage path */
  int64_t u_stride;          /* words between rows of u, >= ceil(R/32); ignored when u is NULL */
  const float* in_scale;     /* [K] */
  const float* latent_scale; /* [R], or NULL exactly when u is NULL */
  const float* out_scale;    /* [N] */
  int64_t rank;              /* R, a multiple of LB2_RANK_MULTIPLE; N for a single-stage path */
} lb2_path;

/* The sizes of a layer and which paths share a first stage: what planning needs to know. It holds no
 * pointers, so that a layer can be planned before it exists. Set struct_size = sizeof(lb2_layer_shape);
 * entries of ranks and shares past num_paths are ignored. littlebit2_kernels.format.LayerShape is the same in
 * Python. */
typedef struct lb2_layer_shape {
  uint64_t struct_size;
  int64_t k;                     /* in_features, >= 1 */
  int64_t n;                     /* out_features, >= 1 */
  int64_t num_paths;             /* 1 .. LB2_MAX_PATHS */
  int64_t ranks[LB2_MAX_PATHS];  /* R of each path; N in a single-stage layer */
  int32_t shares[LB2_MAX_PATHS]; /* for each path, the path whose first stage (v and in_scale) it uses:
                                    itself, or an earlier path of equal rank that uses its own */
  int32_t single_stage;          /* 1 if no path has a U, else 0 */
} lb2_layer_shape;

/* Does the work of items [begin, end) of a range given to lb2_parallel_for. */
typedef void (*lb2_task)(int64_t begin, int64_t end, void* task_context);

/* Covers [0, n) with calls of task(begin, end, task_context) on any threads, each with at least `grain` items
 * except the last, and returns when all are done: 0, or an error code of its own, which the message of the
 * call then names. */
typedef int32_t (*lb2_parallel_for)(void* context, int64_t n, int64_t grain, lb2_task task,
                                    void* task_context);

/* Arguments of the layer calls. Zero-initialize, then set struct_size = sizeof(lb2_linear_args). */
typedef struct lb2_linear_args {
  uint64_t struct_size;
  int64_t m;               /* tokens, >= 0 */
  int64_t k;               /* in_features, >= 1 */
  int64_t n;               /* out_features, >= 1 */
  const lb2_path* paths;   /* [num_paths] */
  int64_t num_paths;       /* 1 .. LB2_MAX_PATHS */
  const float* bias;       /* [N] or NULL; ignored by the backward call */
  const void* input;       /* forward: x [M, K]; backward: the gradient of y, [M, N] */
  int64_t input_stride;    /* elements between rows, >= 0; ignored when m <= 1 */
  void* output;            /* forward: y [M, N]; backward: the gradient of x, [M, K]; may not overlap input */
  int64_t output_stride;   /* elements between rows, >= the row's length; ignored when m <= 1 */
  lb2_dtype dtype;         /* of input and output */
  lb2_isa isa;             /* LB2_ISA_AUTO, or the instruction set to use */
  void* workspace;         /* contents undefined before and after */
  int64_t workspace_bytes; /* at least what the plan of the call says */
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_linear_args;

/* Fill *shape with the shape of the layer of args. Set its struct_size first. Input, output and workspace are
 * not read. */
LB2_API lb2_status lb2_linear_shape(const lb2_linear_args* args, lb2_layer_shape* shape);

/* What a call will do; filled by lb2_linear_plan_cpu. Set struct_size = sizeof(lb2_cpu_plan) first. */
typedef struct lb2_cpu_plan {
  uint64_t struct_size;
  int64_t forward_workspace_bytes;
  int64_t backward_workspace_bytes;
  int64_t token_block;  /* tokens per pass over the packed words */
  int64_t macs;         /* sign-accumulate operations of the forward call, all stages, paths and tokens */
  lb2_isa isa;          /* the instruction set that runs */
  int32_t first_stages; /* first stages computed (paths that share one count once) */
} lb2_cpu_plan;

/* Fill *plan for calls with m tokens on a layer of this shape. isa is that of lb2_linear_args. */
LB2_API lb2_status lb2_linear_plan_cpu(const lb2_layer_shape* shape, int64_t m, lb2_isa isa,
                                       lb2_cpu_plan* plan);

/* y = layer(x), accumulated in fp32. Results have the same bits whatever the ISA, the thread count and the
 * other tokens, as long as all threads of parallel_for have the same floating-point mode (rounding, flushing
 * of subnormals). */
LB2_API lb2_status lb2_linear_forward_cpu(const lb2_linear_args* args);

/* grad_x = the transposed layer applied to grad_y, without bias. Same guarantees. */
LB2_API lb2_status lb2_linear_backward_x_cpu(const lb2_linear_args* args);

/* ---- Prepacked layers: the fast path of the CPU ----
 *
 * A prepacked layer is one block of bytes with signs and scales in the order in which the CPU kernels read
 * them. It is made once, when a layer is loaded, and replaces the portable tensors, which lb2_unprepack_cpu
 * restores. It is valid only in the process (and version of this library) that made it; it is not a file
 * format. */

/* Precision of activations in sums of signs. Accumulation is exact, except in EXACT, where it is in fp32. */
typedef int32_t lb2_activation;
#define LB2_ACTIVATION_AUTO 0  /* EXACT for float32, else INT16; AMX kernels: INT8X2 from 16 tokens */
#define LB2_ACTIVATION_EXACT 1 /* fp32 throughout; error about 1e-6 */
#define LB2_ACTIVATION_INT16 2 /* sums of 5 in 16 bits, one scale per 720 channels; error about 3e-4 */
#define LB2_ACTIVATION_INT8 3  /* 8 bits, one scale per 720 channels; error about 1e-2 */
#define LB2_ACTIVATION_SIGN 4  /* signs times the mean magnitude per token: XNOR and popcount */
/* 5 is a mode of GPUs (cuda.h). */
#define LB2_ACTIVATION_INT8X2 6 /* two planes of 8 bits, scales as above; error about 4e-5; AMX only */

/* Arguments of a prepacked call. Zero-initialize, then set struct_size = sizeof(lb2_prepacked_args). */
typedef struct lb2_prepacked_args {
  uint64_t struct_size;
  const void* layer; /* made by lb2_prepack_cpu; at any address, fastest at a multiple of 64 */
  int64_t layer_bytes;
  int64_t m;
  const float* bias; /* [N] or NULL */
  const void* input; /* x [M, K] */
  int64_t input_stride;
  void* output; /* y [M, N]; may not overlap input */
  int64_t output_stride;
  lb2_dtype dtype;
  lb2_activation activation;
  lb2_isa isa;
  int32_t num_threads; /* threads that parallel_for can run at the same time; < 1 means 1 */
  void* workspace;     /* at least what lb2_prepacked_plan_cpu reports */
  int64_t workspace_bytes;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_prepacked_args;

/* What a call will do. Set struct_size = sizeof(lb2_prepacked_plan) first. */
typedef struct lb2_prepacked_plan {
  uint64_t struct_size;
  int64_t workspace_bytes;
  int64_t token_block; /* tokens per pass over the layer */
  int64_t workers;     /* threads that get work */
  int64_t k, n;
  lb2_isa isa;
  lb2_activation activation; /* AUTO resolved */
} lb2_prepacked_plan;

/* Bytes of the prepacked layer. They depend on more than its shape: in_scales that are equal in value are
 * stored once. Of args, the fields that describe the layer are read: k, n, paths and num_paths. */
LB2_API lb2_status lb2_prepacked_bytes_cpu(const lb2_linear_args* args, int64_t* bytes);

/* Prepack the layer of args into `layer`, over args->parallel_for. layer_bytes must be what
 * lb2_prepacked_bytes_cpu says. */
LB2_API lb2_status lb2_prepack_cpu(const lb2_linear_args* args, void* layer, int64_t layer_bytes);

/* Fill *shape with the shape of a prepacked layer. Set its struct_size first. */
LB2_API lb2_status lb2_prepacked_shape_cpu(const void* layer, int64_t layer_bytes, lb2_layer_shape* shape);

/* Write one path of a prepacked layer to contiguous portable tensors, over parallel_for unless that is NULL.
 * A NULL tensor is skipped. Pad bits are 0. */
LB2_API lb2_status lb2_unprepack_cpu(const void* layer, int64_t layer_bytes, int64_t path, int32_t* v,
                                     int32_t* u, float* in_scale, float* latent_scale, float* out_scale,
                                     lb2_parallel_for parallel_for, void* parallel_context);

/* Fill *plan for args. Input, output and workspace are not read. */
LB2_API lb2_status lb2_prepacked_plan_cpu(const lb2_prepacked_args* args, lb2_prepacked_plan* plan);

/* y = layer(x). The workspace must be that of a plan with the same isa, num_threads and parallel_for. Results
 * have the same bits whatever the ISA, the thread count and the other tokens (a NaN may have any bits), as
 * long as all threads of parallel_for have the same floating-point mode. A token with values that are not
 * finite gets results that are not finite. In INT16 and INT8 these are NaN, which also results if the
 * magnitudes of a chunk sum to more than a float holds. */
LB2_API lb2_status lb2_prepacked_forward_cpu(const lb2_prepacked_args* args);

/* ---- Several prepacked layers in one call ----
 *
 * What surrounds the layers of a decoder block is done in the same call and the same parallel region: the
 * normalization of the input, the activation function of an MLP, and the residual sum. Values between the
 * input and the output are fp32 and are never rounded to dtype. Arithmetic and guarantees are those of
 * lb2_prepacked_forward_cpu: a layer has the same bits in any group and in its own call. */

/* Layers of one lb2_grouped_forward_cpu. */
#define LB2_MAX_LAYERS 8

/* The input x of a call becomes x / sqrt(mean(x^2) + eps) * (weight + offset), the mean over K, before its
 * layers: RMS normalization, with offset 1 for Gemma's. A token whose sum of squares is more than a float
 * holds becomes 0 where it is finite, as in torch. */
typedef struct lb2_norm {
  const void* weight; /* [K] */
  lb2_dtype dtype;    /* of weight */
  float eps;          /* >= 0, finite */
  float offset;       /* finite */
} lb2_norm;

/* A prepacked layer and its bias. */
typedef struct lb2_prepacked_layer {
  const void* data; /* made by lb2_prepack_cpu; at any address, fastest at a multiple of 64 */
  int64_t bytes;
  const float* bias; /* [N] or NULL */
} lb2_prepacked_layer;

/* Where a layer of a group writes: y [M, N]; may not overlap input, nor another output. */
typedef struct lb2_rows {
  void* data;
  int64_t stride; /* elements between rows, >= N; ignored when m <= 1 */
} lb2_rows;

/* y_i = layer_i(norm(x)) + residual for layers of equal K. Zero-initialize, then set
 * struct_size = sizeof(lb2_grouped_args). */
typedef struct lb2_grouped_args {
  uint64_t struct_size;
  const lb2_prepacked_layer* layers; /* [num_layers] */
  const lb2_rows* outputs;           /* [num_layers] */
  int64_t num_layers;                /* 1 .. LB2_MAX_LAYERS */
  int64_t m;
  const lb2_norm* norm; /* or NULL */
  const void* input;    /* x [M, K] */
  int64_t input_stride;
  const void* residual; /* [M, N], only with one layer; or NULL. It may be the output */
  int64_t residual_stride;
  lb2_dtype dtype;           /* of input, outputs and residual */
  lb2_activation activation; /* of every layer */
  lb2_isa isa;
  int32_t num_threads; /* threads that parallel_for can run at the same time; < 1 means 1 */
  void* workspace;     /* at least what lb2_grouped_plan_cpu reports */
  int64_t workspace_bytes;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_grouped_args;

/* What a call will do. Set struct_size = sizeof(lb2_fused_plan) first. */
typedef struct lb2_fused_plan {
  uint64_t struct_size;
  int64_t workspace_bytes;
  int64_t token_block; /* tokens per pass over the layers */
  int64_t workers;     /* threads that get work */
  int64_t k;
  int64_t n[LB2_MAX_LAYERS]; /* of each layer */
  lb2_isa isa;
  lb2_activation activation; /* AUTO resolved */
} lb2_fused_plan;

/* Fill *plan for args. Input, outputs, residual, norm and workspace are not read, but that there is a norm is
 * taken into account. */
LB2_API lb2_status lb2_grouped_plan_cpu(const lb2_grouped_args* args, lb2_fused_plan* plan);

/* The workspace must be that of a plan with the same isa, num_threads, parallel_for and norm or none. */
LB2_API lb2_status lb2_grouped_forward_cpu(const lb2_grouped_args* args);

/* Activation functions of an MLP. */
typedef int32_t lb2_function;
#define LB2_FUNCTION_SILU 0      /* x / (1 + exp(-x)) */
#define LB2_FUNCTION_GELU 1      /* x * Phi(x), the distribution function of the normal distribution */
#define LB2_FUNCTION_GELU_TANH 2 /* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) */
#define LB2_FUNCTION_RELU 3      /* max(x, 0) */

/* A whole MLP. Of three layers, gate, up and down: y = down(f(gate(h)) * up(h)) + residual with h = norm(x).
 * Of two, up and down: y = down(f(up(h))) + residual if N of up is K of down; if it is twice that, gate and
 * up are the first and second half of its rows. Zero-initialize, then set struct_size = sizeof(lb2_mlp_args).
 */
typedef struct lb2_mlp_args {
  uint64_t struct_size;
  const lb2_prepacked_layer* layers; /* [num_layers] */
  int64_t num_layers;                /* 2 or 3 */
  int64_t m;
  const lb2_norm* norm; /* or NULL */
  const void* input;    /* x [M, K] */
  int64_t input_stride;
  const void* residual; /* [M, N] or NULL; it may be the output */
  int64_t residual_stride;
  void* output; /* y [M, N]; may not overlap input */
  int64_t output_stride;
  lb2_dtype dtype;           /* of input, output and residual */
  lb2_activation activation; /* of every layer; AUTO is resolved by dtype for all of them */
  lb2_function function;
  lb2_isa isa;
  int32_t num_threads;
  void* workspace; /* at least what lb2_mlp_plan_cpu reports */
  int64_t workspace_bytes;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_mlp_args;

/* As lb2_grouped_plan_cpu: k of the first layer, n of each of layers. */
LB2_API lb2_status lb2_mlp_plan_cpu(const lb2_mlp_args* args, lb2_fused_plan* plan);

LB2_API lb2_status lb2_mlp_forward_cpu(const lb2_mlp_args* args);

/* ---- Dense int8 rows: heads and embeddings beside the packed layers ----
 *
 *   y[M,N] = scale[N] * (x[M,K] @ weight[N,K]^T) + bias[N]
 *
 * Sums are in fp32, in the order of the calls above: results have the same bits whatever the ISA, the thread
 * count and the other tokens. Zero-initialize, then set struct_size = sizeof(lb2_int8_args). */
typedef struct lb2_int8_args {
  uint64_t struct_size;
  int64_t m;             /* tokens, >= 0 */
  int64_t k;             /* in_features, >= 1 */
  int64_t n;             /* out_features, >= 1 */
  const int8_t* weight;  /* [N, K] */
  int64_t weight_stride; /* bytes between rows, >= K; ignored when n == 1 */
  const float* scale;    /* [N] */
  const float* bias;     /* [N] or NULL */
  const void* input;     /* x [M, K] */
  int64_t input_stride;
  void* output; /* y [M, N]; may not overlap input */
  int64_t output_stride;
  lb2_dtype dtype; /* of input and output */
  lb2_isa isa;
  void* workspace; /* at least what lb2_int8_workspace_cpu says */
  int64_t workspace_bytes;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_int8_args;

/* Bytes of workspace for m tokens of k columns. */
LB2_API lb2_status lb2_int8_workspace_cpu(int64_t m, int64_t k, int64_t* bytes);

LB2_API lb2_status lb2_int8_forward_cpu(const lb2_int8_args* args);

/* ---- Attention of few queries ----
 *
 *   output[b,h,m] = sum over t of softmax_t(score[b,h,m,t]) * value[b,g,t],  g = h / (heads / kv_heads)
 *   score = cap(scale * <query[b,h,m], key[b,g,t]>) + mask[b,h,m,t],  cap(s) = softcap * tanh(s / softcap)
 *
 * Query m sees the keys t with m + offset - window < t <= m + offset if the call is causal. Keys and values
 * are read once for all heads that share them and for up to 8 queries; many queries are faster as matrix
 * products. A row that sees no key gets zeros. Sums are in fp32: results have the same bits whatever the ISA,
 * the thread count and the rest of the batch. Elements of a row are contiguous; the other strides are in
 * elements, and any of them may be 0. Zero-initialize, then set struct_size = sizeof(lb2_attention_args). */
typedef struct lb2_attention_args {
  uint64_t struct_size;
  int64_t batch;      /* B, >= 0 */
  int64_t heads;      /* H, a multiple of kv_heads */
  int64_t kv_heads;   /* >= 1 */
  int64_t queries;    /* M, >= 0 */
  int64_t keys;       /* T, >= 1 */
  int64_t head_size;  /* of queries and keys, >= 1 */
  int64_t value_size; /* of values and the output, >= 1 */
  const void* query;  /* [B, H, M, head_size] */
  int64_t query_strides[3];
  const void* key; /* [B, kv_heads, T, head_size] */
  int64_t key_strides[3];
  const void* value; /* [B, kv_heads, T, value_size] */
  int64_t value_strides[3];
  void* output; /* [B, H, M, value_size]; may not overlap an input */
  int64_t output_strides[3];
  const void* mask; /* [B, H, M, T] or NULL */
  int64_t mask_strides[3];
  lb2_dtype dtype;      /* of queries, keys, values and output */
  lb2_dtype mask_dtype; /* LB2_INT8: bytes, of which 0 hides a key; else what is added to the score */
  float scale;
  float softcap;  /* > 0, or 0 for none */
  int64_t offset; /* of a causal call; T - M where the last query is at the last key */
  int64_t window; /* of a causal call, > 0, or 0 for none */
  int32_t causal; /* 0 or 1 */
  lb2_isa isa;
  int32_t num_threads; /* threads that parallel_for can run at the same time; < 1 means 1 */
  void* workspace;     /* at least what lb2_attention_workspace_cpu says */
  int64_t workspace_bytes;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_attention_args;

/* Bytes of workspace for args, of which only the sizes are read. */
LB2_API lb2_status lb2_attention_workspace_cpu(const lb2_attention_args* args, int64_t* bytes);

LB2_API lb2_status lb2_attention_forward_cpu(const lb2_attention_args* args);

/* ---- Rotary position embedding of queries and keys ----
 *
 * Of each row the first rotary_size elements turn by pairs, (i, i + rotary_size / 2), or (2 i, 2 i + 1) if
 * interleaved: out[a] = x[a] cos[a] - x[b] sin[a], out[b] = x[b] cos[b] + x[a] sin[b]. The others are copied.
 * Products and sums are in fp32, with the same bits whatever the ISA. Elements of a row are contiguous; the
 * other strides are in elements. Zero-initialize, then set struct_size = sizeof(lb2_rotary_args). */
typedef struct lb2_rotary_args {
  uint64_t struct_size;
  int64_t batch;       /* B, >= 0 */
  int64_t tokens;      /* M, >= 0 */
  int64_t heads;       /* H, >= 1 */
  int64_t kv_heads;    /* G, >= 1 */
  int64_t head_size;   /* D, 1 .. 1024 */
  int64_t rotary_size; /* R, even, 2 .. D */
  const void* query;   /* [B, H, M, D] */
  int64_t query_strides[3];
  const void* key; /* [B, G, M, D] */
  int64_t key_strides[3];
  const void* cos; /* [B, M, R] */
  const void* sin;
  int64_t cos_strides[2]; /* of B and M; may be 0 */
  int64_t sin_strides[2];
  void* query_out;       /* [B, M, H, D], contiguous; may not overlap an input */
  void* key_out;         /* [B, M, G, D] */
  lb2_dtype dtype;       /* of queries and keys */
  lb2_dtype angle_dtype; /* of cos and sin */
  int32_t interleaved;   /* 0 or 1 */
  lb2_isa isa;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_rotary_args;

LB2_API lb2_status lb2_rotary_forward_cpu(const lb2_rotary_args* args);

/* ---- A step of decoding: rotation, cache and attention ----
 *
 *   key[b,g,position+m] = turned(new_key[b,g,m]), value[b,g,position+m] = new_value[b,g,m]
 *   output = attention of turned(query) to key and value
 *
 * in one parallel region, with the bits of lb2_rotary_forward_cpu, two copies and lb2_attention_forward_cpu.
 * A causal call has the offset `position`. Rows of key and value are apart from each other and from the other
 * tensors; rows before `position` are read, those after the new ones as the mask says. Zero-initialize, then
 * set struct_size = sizeof(lb2_attention_step_args). */
typedef struct lb2_attention_step_args {
  uint64_t struct_size;
  int64_t batch;       /* B, >= 0 */
  int64_t heads;       /* H, a multiple of kv_heads */
  int64_t kv_heads;    /* G, >= 1 */
  int64_t queries;     /* M, >= 0 */
  int64_t keys;        /* T, rows of the cache that take part, the new ones included, >= 1 */
  int64_t head_size;   /* D, of queries and keys, 1 .. 1024 */
  int64_t value_size;  /* E, of values and the output, >= 1 */
  int64_t rotary_size; /* R, even, 2 .. D */
  int64_t position;    /* of the first new row, 0 .. T - M */
  const void* query;   /* [B, H, M, D] */
  int64_t query_strides[3];
  const void* new_key; /* [B, G, M, D] */
  int64_t new_key_strides[3];
  const void* new_value; /* [B, G, M, E] */
  int64_t new_value_strides[3];
  const void* cos; /* [B, M, R] */
  const void* sin;
  int64_t cos_strides[2]; /* of B and M; may be 0 */
  int64_t sin_strides[2];
  void* key; /* [B, G, T, D] */
  int64_t key_strides[3];
  void* value; /* [B, G, T, E] */
  int64_t value_strides[3];
  void* output; /* [B, H, M, E] */
  int64_t output_strides[3];
  const void* mask; /* [B, H, M, T] or NULL */
  int64_t mask_strides[3];
  lb2_dtype dtype;       /* of queries, keys, values and output */
  lb2_dtype angle_dtype; /* of cos and sin */
  lb2_dtype mask_dtype;  /* as in lb2_attention_args */
  int32_t interleaved;   /* as in lb2_rotary_args */
  float scale;
  float softcap;  /* > 0, or 0 for none */
  int64_t window; /* of a causal call, > 0, or 0 for none */
  int32_t causal; /* 0 or 1 */
  lb2_isa isa;
  int32_t num_threads; /* threads that parallel_for can run at the same time; < 1 means 1 */
  void* workspace;     /* at least what lb2_attention_step_workspace_cpu says */
  int64_t workspace_bytes;
  lb2_parallel_for parallel_for; /* NULL runs on the calling thread */
  void* parallel_context;
} lb2_attention_step_args;

/* Bytes of workspace for args, of which only the sizes are read. */
LB2_API lb2_status lb2_attention_step_workspace_cpu(const lb2_attention_step_args* args, int64_t* bytes);

LB2_API lb2_status lb2_attention_step_forward_cpu(const lb2_attention_step_args* args);

/* Pack `negative` [rows, cols] (one byte each, non-zero means -1) into words [rows, ceil(cols/32)]. Pad bits
 * are 0. Strides are in elements between rows. */
LB2_API lb2_status lb2_pack_signs(const uint8_t* negative, int64_t negative_stride, int64_t rows,
                                  int64_t cols, int32_t* words, int64_t words_stride);

/* Expand words [rows, ceil(cols/32)] to +1 / -1 of `dtype` in out [rows, cols]. */
LB2_API lb2_status lb2_unpack_signs(const int32_t* words, int64_t words_stride, int64_t rows, int64_t cols,
                                    lb2_dtype dtype, void* out, int64_t out_stride);

/* The instruction set that LB2_ISA_AUTO means: the one set by lb2_cpu_set_isa, else the environment variable
 * LB2_CPU_ISA (scalar, avx2, avx512, avx512vnni, neon, amx; read once), else the best that this CPU and its
 * OS support; AMX, which was not run on hardware yet, only where it is asked for. */
LB2_API lb2_status lb2_cpu_isa(lb2_isa* isa);

/* Make LB2_ISA_AUTO mean `isa` in this process. Passing LB2_ISA_AUTO undoes that. */
LB2_API lb2_status lb2_cpu_set_isa(lb2_isa isa);

/* 1 if the instruction set was built in and this CPU and OS can run it, else 0. */
LB2_API int32_t lb2_cpu_isa_available(lb2_isa isa);

/* "auto", "scalar", "avx2", "avx512", "avx512vnni", "neon", "amx", or "unknown". */
LB2_API const char* lb2_isa_name(lb2_isa isa);

/* Message of the last call on this thread that did not return LB2_OK; never NULL. */
LB2_API const char* lb2_last_error(void);

/* Package version, for example "0.1.0". */
LB2_API const char* lb2_version(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LITTLEBIT2_LITTLEBIT2_H_ */
