#include "safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace {

// The format allows no longer header.
constexpr uint64_t kMaxHeader = 100'000'000;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

// Bytes per element; 0 for dtypes that are not whole bytes or not known, whose sizes are not checked.
int64_t item_bytes(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {
      {"BOOL", 1}, {"I8", 1},  {"U8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
      {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

// The part of JSON that headers are made of: objects, arrays, strings and integers that are not negative.
class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  // Calls member(key), which reads the value, for each member of an object.
  template <typename Member>
  void object(const Member& member) {
    expect('{');
    if (take('}')) return;
    do {
      const std::string key = string();
      expect(':');
      member(key);
    } while (take(','));
    expect('}');
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> found;
    expect('[');
    if (take(']')) return found;
    do {
      found.push_back(integer());
    } while (take(','));
    expect(']');
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    for (;;) {
      const char c = next("an unfinished string");
      if (c == '"') return found;
      if (static_cast<unsigned char>(c) < 0x20) wrong("a control character in a string");
      if (c == '\\') {
        escape(&found);
      } else {
        found += c;
      }
    }
  }

  void end() {
    skip();
    if (position_ != text_.size()) wrong("text after the end");
  }

 private:
  [[noreturn]] void wrong(const std::string& what) const {
    fail("the header is not the JSON of a safetensors file: " + what + " at byte " +
         std::to_string(position_));
  }

  void skip() {
    while (position_ < text_.size() && std::strchr(" \t\r\n", text_[position_]) && text_[position_])
      ++position_;
  }

  char next(const char* otherwise) {
    if (position_ == text_.size()) wrong(otherwise);
    return text_[position_++];
  }

  bool take(char wanted) {
    skip();
    if (position_ == text_.size() || text_[position_] != wanted) return false;
    ++position_;
    return true;
  }

  void expect(char wanted) {
    if (!take(wanted)) wrong(std::string("expected '") + wanted + "'");
  }

  int64_t integer() {
    skip();
    const size_t start = position_;
    int64_t value = 0;
    while (position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9') {
      const int digit = text_[position_] - '0';
      if (value > (std::numeric_limits<int64_t>::max() - digit) / 10) wrong("a number that is too large");
      value = 10 * value + digit;
      ++position_;
    }
    if (position_ == start) wrong("expected a number that is not negative");
    if (text_[start] == '0' && position_ > start + 1) wrong("a number with a leading zero");
    return value;
  }

  uint32_t hexadecimal() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next("an unfinished escape");
      const char* digits = "0123456789abcdef";
      const char* found = c ? std::strchr(digits, c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c) : nullptr;
      if (found == nullptr) wrong("an escape that is not hexadecimal");
      value = 16 * value + static_cast<uint32_t>(found - digits);
    }
    return value;
  }

  void escape(std::string* out) {
    const char c = next("an unfinished escape");
    const char* names = "\"\\/bfnrt";
    const char* values = "\"\\/\b\f\n\r\t";
    if (c != 'u') {
      const char* found = c ? std::strchr(names, c) : nullptr;
      if (found == nullptr) wrong("an unknown escape");
      *out += values[found - names];
      return;
    }
    uint32_t code = hexadecimal();
    if (code >= 0xDC00 && code < 0xE000) wrong("half of a surrogate pair");
    if (code >= 0xD800 && code < 0xDC00) {
      if (next("an unfinished escape") != '\\' || next("an unfinished escape") != 'u')
        wrong("half of a surrogate pair");
      const uint32_t low = hexadecimal();
      if (low < 0xDC00 || low >= 0xE000) wrong("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(code, out);
  }

  static void append_utf8(uint32_t code, std::string* out) {
    const auto put = [out](uint32_t byte) { *out += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xC0 | (code >> 6));
    } else {
      if (code < 0x10000) {
        put(0xE0 | (code >> 12));
      } else {
        put(0xF0 | (code >> 18));
        put(0x80 | ((code >> 12) & 0x3F));
      }
      put(0x80 | ((code >> 6) & 0x3F));
    }
    put(0x80 | (code & 0x3F));
  }

  const std::string& text_;
  size_t position_ = 0;
};

TensorInfo read_entry(JsonReader& json, const std::string& name, int64_t data_bytes) {
  TensorInfo tensor{};
  bool has_dtype = false, has_shape = false, has_offsets = false;
  json.object([&](const std::string& key) {
    bool* const seen = key == "dtype"          ? &has_dtype
                       : key == "shape"        ? &has_shape
                       : key == "data_offsets" ? &has_offsets
                                               : nullptr;
    if (seen == nullptr || *seen) fail("tensor " + name + " has an entry " + key + " that must not be there");
    *seen = true;
    if (seen == &has_dtype) {
      tensor.dtype = json.string();
    } else if (seen == &has_shape) {
      tensor.shape = json.integers();
    } else {
      const std::vector<int64_t> offsets = json.integers();
      if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_bytes)
        fail("tensor " + name + " has data_offsets that do not lie in the file's " +
             std::to_string(data_bytes) + " bytes of data");
      tensor.offset = offsets[0];
      tensor.bytes = offsets[1] - offsets[0];
    }
  });
  if (!has_dtype || !has_shape || !has_offsets)
    fail("tensor " + name + " lacks dtype, shape or data_offsets");
  int64_t expected = item_bytes(tensor.dtype);
  if (expected == 0) return tensor;
  for (const int64_t size : tensor.shape)
    if (__builtin_mul_overflow(expected, size, &expected))
      fail("tensor " + name + " has a shape that is too large");
  if (expected != tensor.bytes)
    fail("tensor " + name + " must have " + std::to_string(expected) + " bytes, got " +
         std::to_string(tensor.bytes));
  return tensor;
}

}  // namespace

std::map<std::string, TensorInfo> parse_header(const std::string& header, int64_t data_bytes) {
  std::map<std::string, TensorInfo> tensors;
  bool has_metadata = false;
  JsonReader json(header);
  json.object([&](const std::string& name) {
    if (name == "__metadata__") {
      if (has_metadata) fail("the header has __metadata__ twice");
      has_metadata = true;
      json.object([&](const std::string&) { json.string(); });
    } else if (!tensors.emplace(name, read_entry(json, name, data_bytes)).second) {
      fail("the header has tensor " + name + " twice");
    }
  });
  json.end();

  // Tensors lie one behind the other, and fill the file.
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& [name, tensor] : tensors) ranges.emplace_back(tensor.offset, tensor.offset + tensor.bytes);
  std::sort(ranges.begin(), ranges.end());
  int64_t end = 0;
  for (const auto& [first, last] : ranges) {
    if (first != end)
      fail("tensors overlap, or leave a hole, at byte " + std::to_string(first) + " of the data");
    end = last;
  }
  if (end != data_bytes)
    fail("tensors must fill " + std::to_string(data_bytes) + " bytes of data, got " + std::to_string(end));
  return tensors;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (file_ < 0) fail(path + " cannot be opened: " + std::strerror(errno));
  try {
    struct stat status{};
    if (fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) fail("is not a file");
    const auto file_bytes = static_cast<int64_t>(status.st_size);
    unsigned char length[8];
    if (file_bytes < 8) fail("must have at least 8 bytes, got " + std::to_string(file_bytes));
    read_bytes(0, 8, length);
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | length[i];
    if (header_bytes > kMaxHeader || static_cast<int64_t>(header_bytes) > file_bytes - 8)
      fail("says that its header has " + std::to_string(header_bytes) + " bytes, but the file has " +
           std::to_string(file_bytes));
    std::string header(header_bytes, '\0');
    read_bytes(8, static_cast<int64_t>(header_bytes), header.data());
    const int64_t start = 8 + static_cast<int64_t>(header_bytes);
    tensors_ = parse_header(header, file_bytes - start);
    for (auto& [name, tensor] : tensors_) tensor.offset += start;
  } catch (const std::exception& error) {
    close(file_);
    fail(path + ": " + error.what());
  }
}

SafetensorsFile::~SafetensorsFile() { close(file_); }

std::vector<unsigned char> SafetensorsFile::read(const TensorInfo& tensor) const {
  std::vector<unsigned char> bytes(static_cast<size_t>(tensor.bytes));
  try {
    read_bytes(tensor.offset, tensor.bytes, bytes.data());
  } catch (const std::exception& error) {
    fail(path_ + ": " + error.what());
  }
  return bytes;
}

void SafetensorsFile::read_bytes(int64_t offset, int64_t count, void* into) const {
  auto* out = static_cast<unsigned char*>(into);
  while (count > 0) {
    const ssize_t got = pread(file_, out, static_cast<size_t>(count), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(std::string("cannot be read: ") + std::strerror(errno));
    if (got == 0) fail("ended while it was read");
    out += got;
    offset += got;
    count -= got;
  }
}
