// exp over `Vec`, the same bits on every instruction set. Include this after elementwise_body.h, where that
// file says.

// exp(x) of every lane, within 2 units in the last place: 0 below about -103.97, infinity above about 88.72,
// NaN of NaN. x = n ln 2 + r with an integer n and |r| <= ln 2 / 2; exp(r) = 1 + r + r^2 q(r), where q is the
// polynomial of degree 5 through (exp(r) - 1 - r) / r^2 at Chebyshev nodes.
inline Vec exponential(const Vec& x) {
  // Adding 1.5 * 2^23 rounds to an integer.
  const Vec magic = Vec::broadcast(0x1.8p23f), minus_magic = Vec::broadcast(-0x1.8p23f);
  // The operand that may be NaN comes last: then it is the result.
  const Vec bounded = Vec::min(Vec::broadcast(89.0f), Vec::max(Vec::broadcast(-104.0f), x));
  const Vec n = Vec::add(Vec::fused(bounded, Vec::broadcast(0x1.715476p+0f), magic), minus_magic);
  // ln 2 in two parts, of which the first has few enough bits that n times it is exact.
  Vec r = Vec::fused(n, Vec::broadcast(-0x1.62e4p-1f), bounded);
  r = Vec::fused(n, Vec::broadcast(-0x1.7f7d1cp-20f), r);
  Vec q = Vec::broadcast(0x1.a1517cp-13f);
  for (const float coefficient : {0x1.6d4328p-10f, 0x1.1110c6p-7f, 0x1.5554eap-5f, 0x1.555556p-3f, 0x1p-1f})
    q = Vec::fused(q, r, Vec::broadcast(coefficient));
  const Vec power = Vec::add(Vec::fused(q, Vec::mul(r, r), r), Vec::broadcast(1.0f));
  // In two factors, because 2^n itself may be subnormal or too large.
  const Vec half = Vec::add(Vec::fused(n, Vec::broadcast(0.5f), magic), minus_magic);
  const Vec rest = Vec::fused(half, Vec::broadcast(-1.0f), n);
  return Vec::mul(Vec::mul(power, Vec::power_of_two(half)), Vec::power_of_two(rest));
}

// 1 / (1 + exp(-x)).
inline Vec logistic(const Vec& x) {
  const Vec one = Vec::broadcast(1.0f);
  return Vec::div(one, Vec::add(one, exponential(Vec::mul(x, Vec::broadcast(-1.0f)))));
}
