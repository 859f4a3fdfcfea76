// The online softmax of a tile of queries, for all query heads that read the same keys and values.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_vectors.h"

namespace s2o {

// Up to kKeys rows of K and V that are read together.
struct Chunk {
  int64_t count = 0;
  // Groups of keys have a limit from 0 on: to a score is added what q^2 times `spread` gives, times `shrunk` and at most
  // the limit, and `bias`.
  float limit = -1.0f;
  bool bounded = false;  // some query may not see some key: `position` counts, and rises
  const float *k[kKeys], *v[kKeys];
  const float* spread[kKeys];
  float shrunk[kKeys], bias[kKeys];
  int64_t position[kKeys];
  int32_t document[kKeys];  // counts where rows have documents

  // Adds a group of `size` keys of which `left` were not read, as `tail_groups.tail_logits` weighs it.
  void stand_in(const float* mean_k, const float* variance, const float* mean_v, int32_t left, int32_t size) {
    const float unread = static_cast<float>(left) / static_cast<float>(size);
    k[count] = mean_k, spread[count] = variance, v[count] = mean_v;
    shrunk[count] = std::max(1.0f - 2.0f * std::sqrt(1.0f - unread), 0.0f);
    bias[count++] = std::log2(static_cast<float>(left) * unread);
  }
};

// Sizes of a tile and what its queries, at positions start, start + 1, ..., see of a bounded chunk.
struct Rows {
  int64_t heads, count, width, value_width, start;
  bool causal;
  int64_t window;  // 0 is none
  const int32_t* documents;  // of each query, null where every key is of all of them
};

class Softmax {
 public:
  // Begins a tile; `set_query` then gives it every query, and lanes without one hold zeros.
  void start(const Rows& rows) {
    rows_ = rows, panels_ = (rows.count + kPanel - 1) / kPanel;
    const int64_t lanes = rows.heads * panels_ * kPanel;
    std::memset(queries_.of(lanes * rows.width), 0, sizeof(float) * lanes * rows.width);
    std::memset(outputs_.of(lanes * rows.value_width), 0, sizeof(float) * lanes * rows.value_width);
    std::fill_n(peaks_.of(lanes), lanes, kHidden);
    std::fill_n(masses_.of(lanes), lanes, 0.0f);
    std::fill_n(added_.of(lanes), lanes, 0.0f);
    scores_.of(kKeys * kPanel);
    spreads_.of(kKeys * kPanel);
    squares_.of(kPanel * rows.width);
    zeros_.assign(rows.value_width, 0.0f);
    if (rows.documents) {
      std::fill_n(documents_.of(panels_ * kPanel), panels_ * kPanel, -1);
      std::copy_n(rows.documents, rows.count, documents_.of(0));
    }
  }

  void set_query(int64_t head, int64_t row, const float* query, float factor) {
    float* to = queries_.of(0) + panel_of(head, row) * kPanel * rows_.width + row % kPanel;
    for (int64_t d = 0; d < rows_.width; ++d) to[d * kPanel] = query[d] * factor;
  }

  void add(int64_t head, const Chunk& chunk) {
    Ahead nothing;
    add(head, chunk, nothing);
  }
  void add(int64_t head, const Chunk& chunk, Ahead& ahead) {
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t first = rows_.start + panel * kPanel;
      if (chunk.bounded && rows_.causal && first + kPanel <= chunk.position[0]) continue;
      if (chunk.bounded && rows_.documents && !shares(panel, chunk)) continue;
      add_to_panel(head * panels_ + panel, first, chunk, ahead);
    }
  }

  // Calls of `ahead` while a chunk of `keys` is added to a head.
  int64_t pauses(int64_t keys) const { return panels_ * (keys / kRows + rows_.value_width / kRows); }

  float peak(int64_t head, int64_t row) { return peaks_.of(0)[panel_of(head, row) * kPanel + row % kPanel]; }
  // The mass of a head's rows before the last `settle`, and since.
  float mass(int64_t head, int64_t row) { return masses_.of(0)[panel_of(head, row) * kPanel + row % kPanel]; }
  float added(int64_t head, int64_t row) { return added_.of(0)[panel_of(head, row) * kPanel + row % kPanel]; }
  void settle(int64_t head) {
    const int64_t from = head * panels_ * kPanel;
    float *mass = masses_.of(0) + from, *added = added_.of(0) + from;
    for (int64_t i = 0; i < panels_ * kPanel; ++i) mass[i] += added[i], added[i] = 0.0f;
  }

  // The output (Dv,) of a row, all of whose mass is settled, and its log-sum; 0 and -inf where it saw no key.
  void write(int64_t head, int64_t row, float* output, float* lse) {
    const int64_t lane = panel_of(head, row) * kPanel + row % kPanel;
    const float mass = masses_.of(0)[lane], share = mass == 0.0f ? 0.0f : 1.0f / mass;
    const float* from = outputs_.of(0) + panel_of(head, row) * kPanel * rows_.value_width + row % kPanel;
    for (int64_t d = 0; d < rows_.value_width; ++d) output[d] = from[d * kPanel] * share;
    *lse = mass == 0.0f ? kHidden : (peaks_.of(0)[lane] + std::log2(mass)) * 0.6931471805599453f;
  }

 private:
  // First and last lane, exclusive, of the panel at position `first` that see a key of a bounded chunk.
  int64_t first_lane(int64_t first, int64_t position) const {
    return rows_.causal ? std::clamp<int64_t>(position - first, 0, kPanel) : 0;
  }
  int64_t last_lane(int64_t first, int64_t position) const {
    return rows_.window ? std::clamp<int64_t>(position + rows_.window - first, 0, kPanel) : kPanel;
  }
  // Whether a query of the panel and a key of the chunk are of one document.
  bool shares(int64_t panel, const Chunk& chunk) {
    const int32_t* own = documents_.of(0) + panel * kPanel;
    for (int64_t j = 0; j < chunk.count; ++j) {
      if (j && chunk.document[j] == chunk.document[j - 1]) continue;
      if (std::find(own, own + kPanel, chunk.document[j]) != own + kPanel) return true;
    }
    return false;
  }
  int64_t panel_of(int64_t head, int64_t row) const { return head * panels_ + row / kPanel; }
  void add_to_panel(int64_t panel, int64_t first, const Chunk& chunk, Ahead& ahead);
  void add_spread(const float* queries, const Chunk& chunk);
  bool separate_broken(int64_t first, const Chunk& chunk, const float** finite, float* output);

  Rows rows_{};
  int64_t panels_ = 0;
  // Per head and panel: queries (D, kPanel), outputs (Dv, kPanel), peak, mass and mass since `settle` (kPanel).
  Buffer queries_, outputs_, peaks_, masses_, added_;
  Buffer scores_;  // (kKeys, kPanel) of one chunk, then its weights
  Buffer spreads_, squares_;  // (kKeys, kPanel) of one chunk and (D, kPanel) of one panel
  Array<int32_t> documents_;  // of the queries of each panel, -1 where there is none
  std::vector<float> zeros_;
};

inline void Softmax::add_to_panel(int64_t panel, int64_t first, const Chunk& chunk, Ahead& ahead) {
  float* scores = scores_.of(0);
  const float* queries = queries_.of(0) + panel * kPanel * rows_.width;
  multiply_all<kVectors>(chunk.k, chunk.count, queries, kPanel, rows_.width, scores, kPanel, ahead);
  if (chunk.limit >= 0.0f) add_spread(queries, chunk);
  if (chunk.bounded)
    for (int64_t j = 0; j < chunk.count; ++j) {
      float* row = scores + j * kPanel;
      std::fill(row, row + first_lane(first, chunk.position[j]), kHidden);
      std::fill(row + last_lane(first, chunk.position[j]), row + kPanel, kHidden);
    }
  if (chunk.bounded && rows_.documents) {
    const int32_t* own = documents_.of(0) + (first - rows_.start);
    for (int64_t j = 0; j < chunk.count; ++j)
      for (int i = 0; i < kPanel; ++i)
        scores[j * kPanel + i] = own[i] == chunk.document[j] ? scores[j * kPanel + i] : kHidden;
  }

  float *peak = peaks_.of(0) + panel * kPanel, *output = outputs_.of(0) + panel * kPanel * rows_.value_width;
  float *mass = masses_.of(0) + panel * kPanel, *added = added_.of(0) + panel * kPanel;
  Vec top[kVectors], base[kVectors], sum[kVectors] = {};
  for (int c = 0; c < kVectors; ++c) top[c] = vec(peak + c * kLanes);
  for (int64_t j = 0; j < chunk.count; ++j)
    for (int c = 0; c < kVectors; ++c) {
      const Vec x = vec(scores + j * kPanel + c * kLanes);
      top[c] = x > top[c] ? x : top[c];
    }
  Bits risen = {};
  for (int c = 0; c < kVectors; ++c) {
    risen |= top[c] != vec(peak + c * kLanes);
    base[c] = top[c] == splat(kHidden) ? Vec{} : top[c];
  }
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= risen[i] != 0;
  if (any) {  // rare once the heaviest keys have been read
    for (int c = 0; c < kVectors; ++c) {
      const Vec shrink = exp2_of(vec(peak + c * kLanes) - base[c]);
      vec(peak + c * kLanes) = top[c];
      vec(mass + c * kLanes) *= shrink;
      vec(added + c * kLanes) *= shrink;
      for (int64_t d = 0; d < rows_.value_width; ++d) vec(output + d * kPanel + c * kLanes) *= shrink;
    }
  }
  for (int64_t j = 0; j < chunk.count; ++j)
    for (int c = 0; c < kVectors; ++c) {
      Vec& x = vec(scores + j * kPanel + c * kLanes);
      x = exp2_of(x - base[c]);
      sum[c] += x;
    }
  for (int c = 0; c < kVectors; ++c) vec(added + c * kLanes) += sum[c];

  const float* finite[kKeys];
  const float* const* values = chunk.v;
  if (chunk.bounded && separate_broken(first, chunk, finite, output)) values = finite;
  accumulate_all(values, chunk.count, scores, rows_.value_width, output, ahead);
}

inline void Softmax::add_spread(const float* queries, const Chunk& chunk) {
  float *scores = scores_.of(0), *spreads = spreads_.of(0), *squares = squares_.of(0);
  for (int64_t i = 0; i < rows_.width * kPanel; i += kLanes) vec(squares + i) = vec(queries + i) * vec(queries + i);
  multiply_all<kVectors>(chunk.spread, chunk.count, squares, kPanel, rows_.width, spreads, kPanel);
  const Vec limit = splat(chunk.limit);
  for (int64_t j = 0; j < chunk.count; ++j)
    for (int c = 0; c < kVectors; ++c) {
      const Vec spread = vec(spreads + j * kPanel + c * kLanes) * chunk.shrunk[j];
      vec(scores + j * kPanel + c * kLanes) += (spread > limit ? limit : spread) + chunk.bias[j];
    }
}

// A weight of 0 times NaN is NaN: a value that some row must not see may not reach it through their product. Rows of V
// that hold NaN or infinity are added by themselves, to those who see them, and are zeros in `finite`. Returns whether
// there are any.
inline bool Softmax::separate_broken(int64_t first, const Chunk& chunk, const float** finite, float* output) {
  bool any = false;
  for (int64_t j = 0; j < chunk.count; ++j) {
    const float* value = finite[j] = chunk.v[j];
    if (is_finite(value, rows_.value_width)) continue;
    any = true;
    finite[j] = zeros_.data();
    const float* weight = scores_.of(0) + j * kPanel;
    const int32_t* own = rows_.documents ? documents_.of(0) + (first - rows_.start) : nullptr;
    for (int64_t i = first_lane(first, chunk.position[j]); i < last_lane(first, chunk.position[j]); ++i) {
      if (own && own[i] != chunk.document[j]) continue;
      for (int64_t d = 0; d < rows_.value_width; ++d) output[d * kPanel + i] += weight[i] * value[d];
    }
  }
  return any;
}

}  // namespace s2o
