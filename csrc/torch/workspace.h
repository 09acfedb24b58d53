// Scratch memory of calls on prepacked layers.
#pragma once

#include <cstdint>
#include <memory>

namespace lb2::torch_ops {

// Scratch memory that a thread keeps between calls, because making a tensor costs as much as a small layer.
// Large workspaces are not kept.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    constexpr int64_t kLargestKept = 8 << 20;
    if (bytes > kLargestKept) {
      own_.reset(new char[static_cast<size_t>(bytes)]);
    } else if (bytes > kept_bytes_) {
      kept_.reset(new char[static_cast<size_t>(bytes)]);
      kept_bytes_ = bytes;
    }
  }
  void* data() const { return own_ ? own_.get() : kept_.get(); }

 private:
  std::unique_ptr<char[]> own_;
  static thread_local std::unique_ptr<char[]> kept_;
  static thread_local int64_t kept_bytes_;
};
inline thread_local std::unique_ptr<char[]> Workspace::kept_;
inline thread_local int64_t Workspace::kept_bytes_ = 0;

}  // namespace lb2::torch_ops
