#include "core/status.h"

#include <cstdarg>
#include <cstdio>

namespace lb2 {
namespace {

thread_local char last_error[512] = "";

}  // namespace

lb2_status fail(lb2_status status, const char* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace lb2

extern "C" const char* lb2_last_error(void) { return lb2::last_error; }

extern "C" const char* lb2_version(void) { return LB2_VERSION_STRING; }
