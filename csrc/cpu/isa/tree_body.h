// Sums of lanes in a fixed order. Include this where elementwise_body.h says, which includes it.

// Adds 16 lanes up in place: lane i + lane i + 8, then + 4, + 2, + 1.
inline float tree_sum(float* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}
