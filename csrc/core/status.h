// Status helpers of the core: record a message for this thread and return the code. LB2_API in internal
// headers exports what liblittlebit2_cuda uses of the core library.
#pragma once

#include "littlebit2/littlebit2.h"

namespace lb2 {

// Formats the message that lb2_last_error() returns on this thread, and returns `status`.
[[gnu::format(printf, 2, 3)]] LB2_API lb2_status fail(lb2_status status, const char* format, ...) noexcept;

}  // namespace lb2

// Leaves the current function with the status of `expression` unless that is LB2_OK.
#define LB2_RETURN_IF_ERROR(expression)            \
  do {                                             \
    const lb2_status lb2_status_ = (expression);   \
    if (lb2_status_ != LB2_OK) return lb2_status_; \
  } while (false)
