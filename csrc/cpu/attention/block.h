// Blocks of queries, widened to fp32, on pieces of keys: what the drivers of attention share. Built without
// ISA flags: all work proportional to keys times elements is in the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/shape.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/parallel.h"

namespace lb2::cpu {

// Queries of a head whose partial results are held at a time; each block reads all keys and values.
constexpr int64_t kQueryBlock = 8;

struct Workspace {
  int64_t rows, pieces, query_stride, out_stride;
  int64_t queries, largest, sums, outs, bytes;  // offsets in floats; bytes of all

  explicit Workspace(const lb2_attention_args& args)
      : rows(args.batch * args.heads * std::min(args.queries, kQueryBlock)),
        pieces((args.keys + kAttentionKeys - 1) / kAttentionKeys),
        // A row of queries makes room for the result of the row in the end.
        query_stride(padded_size(std::max(args.head_size, args.value_size))),
        out_stride(padded_size(args.value_size)) {
    int64_t end = 0;
    const auto place = [&](int64_t floats) {
      const int64_t start = end;
      end += padded_size(floats);
      return start;
    };
    queries = place(rows * query_stride);
    outs = place(rows * pieces * out_stride);
    largest = place(rows * pieces);
    sums = place(rows * pieces);
    bytes = rows == 0 ? 0 : end * static_cast<int64_t>(sizeof(float)) + 63;
  }

  // Where the floats begin.
  static float* floats(void* workspace) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
  }
};

// A block of queries of all heads. Row r of head h of batch b has the number (b * heads + h) * count + r.
struct Block {
  const lb2_attention_args& args;
  const IsaKernels& isa;
  const Workspace& space;
  float* floats;
  int64_t first, count;  // queries

  int64_t bytes() const { return element_bytes(args.dtype); }
  int64_t group() const { return args.heads / args.kv_heads; }
  int64_t row_of(int64_t b, int64_t h, int64_t m) const { return (b * args.heads + h) * count + m; }

  const char* at(const void* data, const int64_t (&strides)[3], int64_t b, int64_t h, int64_t i) const {
    return static_cast<const char*>(data) + (b * strides[0] + h * strides[1] + i * strides[2]) * bytes();
  }

  // Widens a row of queries, and scales it.
  void widen_row(const void* row, int64_t b, int64_t h, int64_t m) const {
    float* query = floats + space.queries + row_of(b, h, m) * space.query_stride;
    isa.portable->load_padded(args.dtype, row, args.head_size, space.query_stride, query);
    for (int64_t i = 0; i < args.head_size; ++i) query[i] *= args.scale;
  }

  void widen() const {
    for (int64_t b = 0; b < args.batch; ++b)
      for (int64_t h = 0; h < args.heads; ++h)
        for (int64_t m = 0; m < count; ++m)
          widen_row(at(args.query, args.query_strides, b, h, first + m), b, h, m);
  }

  // Writes what is added to the scores of `keys` keys from `begin` on.
  void addends(int64_t b, int64_t h, int64_t m, int64_t begin, int64_t keys, float* out) const {
    const int64_t index =
        b * args.mask_strides[0] + h * args.mask_strides[1] + (first + m) * args.mask_strides[2];
    if (args.mask == nullptr) {
      std::fill_n(out, keys, 0.0f);
    } else if (args.mask_dtype == LB2_INT8) {
      const char* mask = static_cast<const char*>(args.mask) + index + begin;
      for (int64_t i = 0; i < keys; ++i) out[i] = mask[i] != 0 ? 0.0f : -INFINITY;
    } else {
      const char* mask =
          static_cast<const char*>(args.mask) + (index + begin) * element_bytes(args.mask_dtype);
      isa.portable->load_padded(args.mask_dtype, mask, keys, padded_size(keys), out);
    }
    if (args.causal == 0) return;
    const int64_t last = first + m + args.offset - begin;
    for (int64_t i = std::max<int64_t>(last + 1, 0); i < keys; ++i) out[i] = -INFINITY;
    if (args.window == 0) return;
    for (int64_t i = 0; i < std::min(last - args.window + 1, keys); ++i) out[i] = -INFINITY;
  }

  int64_t piece_tasks() const { return args.batch * args.kv_heads * space.pieces; }
  int64_t combine_tasks() const { return args.batch * args.heads * count; }

  bool all_visible(int64_t begin, int64_t keys) const {
    if (args.mask != nullptr) return false;
    if (args.causal == 0) return true;
    return begin + keys - 1 <= first + args.offset &&
           (args.window == 0 || begin > first + count - 1 + args.offset - args.window);
  }

  // Piece `piece` of the keys of head g, for all rows that read it.
  void piece_task(int64_t task) const {
    const int64_t piece = task % space.pieces, g = task / space.pieces % args.kv_heads,
                  b = task / space.pieces / args.kv_heads;
    const int64_t begin = piece * kAttentionKeys, keys = std::min(kAttentionKeys, args.keys - begin);
    const int64_t rows = group() * count;
    for (int64_t row = 0; row < rows; row += kAttentionRows)
      piece_rows(b, g, piece, begin, keys, row,
                 static_cast<int>(std::min<int64_t>(kAttentionRows, rows - row)));
  }

  void piece_rows(int64_t b, int64_t g, int64_t piece, int64_t begin, int64_t keys, int64_t row,
                  int rows) const {
    const int64_t first_row = row_of(b, g * group(), 0) + row;
    float added[kAttentionRows * kAttentionKeys];
    const float* addends_of[kAttentionRows];
    const bool limited = !all_visible(begin, keys);
    int64_t low = 0, high = keys;
    if (limited) {
      low = keys, high = 0;
      for (int r = 0; r < rows; ++r) {
        const int64_t h = g * group() + (row + r) / count, m = (row + r) % count;
        float* out = added + r * kAttentionKeys;
        // The heads of a group mostly share their mask.
        if (r >= count && (args.mask == nullptr || args.mask_strides[1] == 0)) {
          addends_of[r] = addends_of[r - count];
          continue;
        }
        addends(b, h, m, begin, keys, out);
        addends_of[r] = out;
        int64_t i = 0, end = keys;
        while (i < low && out[i] == -INFINITY) ++i;
        while (end > high && out[end - 1] == -INFINITY) --end;
        low = std::min(low, i);
        high = std::max(high, end);
      }
      // Keys that no row sees are not read: a static cache is mostly empty. The rest keep their lanes, so
      // that the bits of a row do not depend on what the others see.
      low -= low % kLanes;
      for (int r = 0; r < rows; ++r) addends_of[r] += low;
    }
    float* largest = floats + space.largest + first_row * space.pieces + piece;
    float* sum = floats + space.sums + first_row * space.pieces + piece;
    if (low >= high) {
      for (int r = 0; r < rows; ++r) {
        largest[r * space.pieces] = -INFINITY;
        sum[r * space.pieces] = 0.0f;
      }
      return;
    }
    const AttentionPiece work = {
        args.dtype,
        at(args.key, args.key_strides, b, g, begin + low),
        args.key_strides[2] * bytes(),
        at(args.value, args.value_strides, b, g, begin + low),
        args.value_strides[2] * bytes(),
        high - low,
        args.head_size,
        args.value_size,
        floats + space.queries + first_row * space.query_stride,
        space.query_stride,
        rows,
        args.softcap,
        limited ? addends_of : nullptr,
        largest,
        sum,
        floats + space.outs + (first_row * space.pieces + piece) * space.out_stride,
        space.pieces,
        space.pieces * space.out_stride,
    };
    isa.attention->piece(work);
  }

  void combine_task(int64_t row) const {
    const int64_t m = row % count, h = row / count % args.heads, b = row / count / args.heads;
    const int64_t at_piece = row * space.pieces;
    const AttentionRow work = {space.pieces,
                               floats + space.largest + at_piece,
                               floats + space.sums + at_piece,
                               floats + space.outs + at_piece * space.out_stride,
                               space.out_stride,
                               args.value_size};
    float* result = floats + space.queries + row * space.query_stride;
    isa.attention->combine(work, result);
    char* output =
        static_cast<char*>(args.output) +
        (b * args.output_strides[0] + h * args.output_strides[1] + (first + m) * args.output_strides[2]) *
            bytes();
    isa.portable->store(args.dtype, result, args.value_size, output);
  }
};

// Runs tasks of phases for a block: run(phase, task). A phase starts when the one before it is done.
template <int kPhases, typename Run>
lb2_status run_phases(const Block& block, const int64_t (&counts)[kPhases], const Run& run) {
  const lb2_attention_args& args = block.args;
  const int64_t rows = args.batch * args.heads * block.count;
  const int64_t macs = rows * args.keys * (args.head_size + args.value_size);
  const int64_t most = args.parallel_for == nullptr ? 1 : std::max<int64_t>(1, args.num_threads);
  const int64_t workers = std::clamp<int64_t>(macs / kMacsPerChunk, 1, std::min(most, counts[0]));
  if (workers == 1) {
    for (int phase = 0; phase < kPhases; ++phase)
      for (int64_t task = 0; task < counts[phase]; ++task) run(phase, task);
    return LB2_OK;
  }
  Phases phases(counts, workers);
  const auto numbered = [&](int phase, int64_t task, int64_t) { run(phase, task); };
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) phases.work(worker, numbered);
  };
  return run_parallel(args.parallel_for, args.parallel_context, workers, 1, body);
}

}  // namespace lb2::cpu
