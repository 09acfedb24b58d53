// The one switch that the CUDA kernels take from the environment.
#pragma once

#include <cstdlib>
#include <cstring>

namespace lb2::cuda {

// LB2_CUDA_CHAINED=0 turns programmatic dependent launch off, to tell whether a fault comes of it. It is read
// once.
inline bool may_chain() noexcept {
  static const bool may = [] {
    const char* text = std::getenv("LB2_CUDA_CHAINED");
    return text == nullptr || std::strcmp(text, "0") != 0;
  }();
  return may;
}

}  // namespace lb2::cuda
