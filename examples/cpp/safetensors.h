// Reads safetensors files: https://github.com/huggingface/safetensors#format. The file may come from anybody:
// every size in it is checked before it is used.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct TensorInfo {
  std::string dtype;  // as the file says: "F32", "I32", ...
  std::vector<int64_t> shape;
  int64_t offset;  // of its first byte in the file
  int64_t bytes;
};

class SafetensorsFile {
 public:
  // Opens the file and reads its header. Throws std::runtime_error, which names the file and what is wrong
  // with it.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }

  // The bytes of a tensor of this file. Throws std::runtime_error.
  std::vector<unsigned char> read(const TensorInfo& tensor) const;

 private:
  void read_bytes(int64_t offset, int64_t count, void* into) const;

  std::string path_;
  int file_;
  std::map<std::string, TensorInfo> tensors_;
};

// The tensors that a header describes, checked to fill `data_bytes` bytes exactly. Offsets are those of the
// header. Throws std::runtime_error.
std::map<std::string, TensorInfo> parse_header(const std::string& header, int64_t data_bytes);
