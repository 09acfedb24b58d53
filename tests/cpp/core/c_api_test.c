/* A C client of the library: includes the public headers only, runs a layer and checks its numbers. */
#include "littlebit2/cuda.h"
#include "littlebit2/littlebit2.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 3, K = 70, N = 45, R0 = 16, R1 = 40 };

static int failures = 0;

#define EXPECT(condition)                                                                    \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      fprintf(stderr, "%s:%d: %s [%s]\n", __FILE__, __LINE__, #condition, lb2_last_error()); \
      ++failures;                                                                            \
    }                                                                                        \
  } while (0)

static double uniform(void) { return (double)rand() / RAND_MAX * 2.0 - 1.0; }

static void fill(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = (float)uniform();
}

/* Random signs, kept dense for the reference and packed for the library. */
static void fill_signs(double* dense, int32_t* words, int64_t rows, int64_t cols) {
  uint8_t* negative = malloc((size_t)(rows * cols));
  for (int64_t i = 0; i < rows * cols; ++i) {
    negative[i] = (uint8_t)(rand() & 1);
    dense[i] = negative[i] ? -1.0 : 1.0;
  }
  EXPECT(lb2_pack_signs(negative, cols, rows, cols, words, lb2_words_per_row(cols)) == LB2_OK);
  free(negative);
}

struct problem {
  float x[M * K], bias[N], in_scale[2][K], out_scale[2][N], latent_scale[2][R1];
  double v[2][R1 * K], u[2][N * R1], expected[M * N];
  int32_t v_words[2][R1 * ((K + 31) / 32)], u_words[2][N * ((R1 + 31) / 32)];
  lb2_path paths[2];
};

static void make_problem(struct problem* p) {
  static const int64_t ranks[2] = {R0, R1};
  fill(p->x, M * K);
  fill(p->bias, N);
  for (int i = 0; i < M * N; ++i) p->expected[i] = p->bias[i % N];
  for (int path = 0; path < 2; ++path) {
    const int64_t rank = ranks[path];
    fill(p->in_scale[path], K);
    fill(p->out_scale[path], N);
    fill(p->latent_scale[path], rank);
    fill_signs(p->v[path], p->v_words[path], rank, K);
    fill_signs(p->u[path], p->u_words[path], N, rank);
    lb2_path* args = &p->paths[path];
    args->v = p->v_words[path];
    args->v_stride = lb2_words_per_row(K);
    args->u = p->u_words[path];
    args->u_stride = lb2_words_per_row(rank);
    args->in_scale = p->in_scale[path];
    args->latent_scale = p->latent_scale[path];
    args->out_scale = p->out_scale[path];
    args->rank = rank;
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        double y = 0.0;
        for (int64_t r = 0; r < rank; ++r) {
          double z = 0.0;
          for (int k = 0; k < K; ++k)
            z += p->v[path][r * K + k] * (double)p->x[m * K + k] * (double)p->in_scale[path][k];
          y += p->u[path][n * rank + r] * (double)p->latent_scale[path][r] * z;
        }
        p->expected[m * N + n] += (double)p->out_scale[path][n] * y;
      }
  }
}

static void test_forward(const struct problem* p) {
  float y[M * N];
  lb2_cpu_plan plan;
  lb2_layer_shape shape;
  lb2_linear_args args;
  memset(&args, 0, sizeof args);
  memset(&plan, 0, sizeof plan);
  plan.struct_size = sizeof plan;
  args.struct_size = sizeof args;
  args.m = M;
  args.k = K;
  args.n = N;
  args.paths = p->paths;
  args.num_paths = 2;
  args.bias = p->bias;
  args.input = p->x;
  args.input_stride = K;
  args.output = y;
  args.output_stride = N;
  args.dtype = LB2_FLOAT32;
  shape.struct_size = sizeof shape;
  EXPECT(lb2_linear_shape(&args, &shape) == LB2_OK);
  EXPECT(shape.k == K && shape.n == N && shape.num_paths == 2 && shape.ranks[1] == R1 && !shape.single_stage);
  EXPECT(lb2_linear_plan_cpu(&shape, M, LB2_ISA_AUTO, &plan) == LB2_OK);
  EXPECT(plan.first_stages == 2);
  EXPECT(plan.macs == (int64_t)M * (R0 + R1) * (K + N));
  args.workspace_bytes = plan.forward_workspace_bytes;
  args.workspace = malloc((size_t)args.workspace_bytes);
  EXPECT(lb2_linear_forward_cpu(&args) == LB2_OK);
  double error = 0.0, norm = 0.0;
  for (int i = 0; i < M * N; ++i) {
    error += pow((double)y[i] - p->expected[i], 2);
    norm += pow(p->expected[i], 2);
  }
  EXPECT(norm > 0.0 && sqrt(error / norm) < 2e-6);
  free(args.workspace);

  /* Planning needs neither the layer nor a GPU. */
  lb2_layer_shape planned = {sizeof planned, K, N, 2, {R0, R1}, {0, 1}, 0};
  lb2_cuda_device device = {sizeof device, 90, 132, 232448};
  lb2_cuda_plan cuda;
  memset(&cuda, 0, sizeof cuda);
  cuda.struct_size = sizeof cuda;
  EXPECT(lb2_linear_plan_cuda(&planned, M, LB2_FLOAT32, LB2_ACTIVATION_AUTO, &device, NULL, &cuda) == LB2_OK);
  EXPECT(cuda.activation == LB2_ACTIVATION_EXACT && cuda.num_launches == 2 && cuda.macs == plan.macs);
  device.capability = 75;
  EXPECT(lb2_linear_plan_cuda(&planned, M, LB2_FLOAT32, LB2_ACTIVATION_AUTO, &device, NULL, &cuda) ==
         LB2_ERROR_UNSUPPORTED);
  EXPECT(strstr(lb2_last_error(), "7.5") != NULL);

  args.workspace = NULL;
  EXPECT(lb2_linear_forward_cpu(&args) == LB2_ERROR_INVALID_ARGUMENT);
  EXPECT(strstr(lb2_last_error(), "workspace") != NULL);
}

int main(int argc, char** argv) {
  lb2_isa isa = -1;
  if (argc > 1 && strcmp(argv[1], "--expect-isa-error") == 0) {
    EXPECT(lb2_cpu_isa(&isa) == LB2_ERROR_INVALID_ARGUMENT);
    EXPECT(strstr(lb2_last_error(), "LB2_CPU_ISA") != NULL);
    return failures != 0;
  }
  EXPECT(lb2_cpu_isa(&isa) == LB2_OK);
  if (argc > 1 && strncmp(argv[1], "--expect-isa=", 13) == 0)
    EXPECT(strcmp(lb2_isa_name(isa), argv[1] + 13) == 0);
  EXPECT(strchr(lb2_version(), '.') != NULL);
  struct problem* problem = calloc(1, sizeof *problem);
  make_problem(problem);
  test_forward(problem);
  free(problem);
  return failures != 0;
}
