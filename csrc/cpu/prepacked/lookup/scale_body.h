// The scale of a chunk's integers. Include this where elementwise_body.h says; lookup/body.h includes it.

struct ChunkScale {
  float factor;  // of the operand, before it is rounded
  float unit;    // of the sums
};

// `total` is the sum of what the bound is the maximum of: maxima drop NaN, sums do not.
inline ChunkScale chunk_scale(float limit, float bound, float total) {
  constexpr float kLargest = 0x1.fffffep127f;
  if (!(total <= kLargest)) return {0.0f, __builtin_nanf("")};
  const float safe = bound < kLeastBound ? kLeastBound : bound;
  return {limit / safe, safe * (1.0f / limit)};
}
