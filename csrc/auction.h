// What auction.cpp computes; fastsae/matching.py says what it is for.
#pragma once
#include <cstdint>

namespace fastsae {

struct AuctionArgs {
  const double* values;    // (n, c); -inf pads
  const int32_t* columns;  // (n, c), in [0, n_columns)
  int64_t n, c, n_columns;
  double step;
  int64_t* partners;  // (n) out: a column, or -1
  double* prices;     // (n_columns) out
};

void auction(const AuctionArgs& a);

}  // namespace fastsae
