// Results to the caller's dtype. Compiled once for the base instruction set: a few rows per call.
#pragma once

#include "attend_types.h"

namespace kvtuner {

// out[row][head] = values * factor.
void store_out(const AttendCall& c, int64_t row, int64_t head, const float* values, float factor);

}  // namespace kvtuner
