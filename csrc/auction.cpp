// auction: each row bids for the column that gains it most, value - price, by as much as it would
// rather have it than the second best (or nothing, which gains 0) and a step more; who had the
// column bids again (Bertsekas 1988). Rows bid one after the other, in the order in which they lost
// their column, so there is one result. A row that nothing gains anything stays alone.
#include "auction.h"

#include <cmath>
#include <vector>

namespace fastsae {
namespace {

struct Bid {
  int64_t column = -1;
  double gain = -INFINITY, second = 0;  // what else there is: nothing, or another column
};

Bid best(const AuctionArgs& a, int64_t row) {
  const double* values = a.values + row * a.c;
  const int32_t* columns = a.columns + row * a.c;
  Bid bid;
  for (int64_t i = 0; i < a.c; ++i) {
    const double gain = values[i] - a.prices[columns[i]];
    if (gain > bid.gain) bid.column = columns[i], bid.gain = gain;
  }
  for (int64_t i = 0; i < a.c; ++i) {
    const double gain = values[i] - a.prices[columns[i]];
    if (columns[i] != bid.column && gain > bid.second) bid.second = gain;
  }
  return bid;
}

}  // namespace

void auction(const AuctionArgs& a) {
  std::vector<int64_t> owner(a.n_columns, -1), bidders(a.n), losers;
  for (int64_t j = 0; j < a.n_columns; ++j) a.prices[j] = 0;
  for (int64_t i = 0; i < a.n; ++i) bidders[i] = i, a.partners[i] = -1;
  for (; !bidders.empty(); bidders.swap(losers)) {
    losers.clear();
    for (const int64_t row : bidders) {
      const Bid bid = best(a, row);
      if (!(bid.gain > 0)) continue;
      int64_t& had = owner[bid.column];
      if (had >= 0) a.partners[had] = -1, losers.push_back(had);
      had = row, a.partners[row] = bid.column;
      a.prices[bid.column] += bid.gain - bid.second + a.step;
    }
  }
}

}  // namespace fastsae
