// Puts the keys of a block into groups of like keys: kernels/tail_groups.py, `tail_groups`, which says what and why.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu_vectors.h"

namespace s2o {

// The keys of a block with their values, `allowed` null or which of them may be seen, and where its groups go: `first`
// is the number of the first of them.
struct Block {
  const float *k, *v;
  int64_t k_stride, v_stride;
  const uint8_t* allowed;
  int32_t first;
  int32_t* member;              // (size,)
  float *mean, *spread, *mean_v;  // (clusters, D), (clusters, D), (clusters, Dv)
};

class Grouper {
 public:
  // Of every block: its keys, and the sizes of `Geometry`. Variances are multiplied by `factor`.
  Grouper(int64_t size, int64_t width, int64_t value_width, int64_t clusters, int64_t rounds, float factor)
      : size_(size), width_(width), value_width_(value_width), clusters_(clusters), rounds_(rounds), factor_(factor),
        depth_(width + value_width), stride_((size + kPanel - 1) / kPanel * kPanel) {}

  void group(const Block& block) {
    set_features(block.k, block.k_stride, width_, 0, block.allowed);
    set_features(block.v, block.v_stride, value_width_, width_, block.allowed);
    assign(block.allowed);
    for (int64_t j = 0; j < size_; ++j) block.member[j] = block.first + nearest_.of(0)[j];
    average(block.k, block.k_stride, width_, block.allowed, block.mean);
    average(block.v, block.v_stride, value_width_, block.allowed, block.mean_v);
    set_spread(block);
  }

 private:
  static bool shown(const uint8_t* allowed, int64_t j) { return !allowed || allowed[j]; }
  void set_features(const float* rows, int64_t stride, int64_t width, int64_t at, const uint8_t* allowed);
  void assign(const uint8_t* allowed);
  void find_nearest();
  void average(const float* rows, int64_t stride, int64_t width, const uint8_t* allowed, float* means);
  void set_spread(const Block& block);

  const int64_t size_, width_, value_width_, clusters_, rounds_;
  const float factor_;
  const int64_t depth_, stride_;
  Buffer features_, columns_;  // (size, D + Dv), and (D + Dv, stride): the same with keys along the lanes
  Buffer centres_, moved_, products_, centre_, square_;
  Array<int32_t> nearest_, counts_;  // the group of each key, counted from 0, and how many keys each has
};

// Rows over the root mean square of their deviation from their mean; zeros where they are hidden.
inline void Grouper::set_features(const float* rows, int64_t stride, int64_t width, int64_t at,
                                  const uint8_t* allowed) {
  float *mean = centre_.of(width), *square = square_.of(width);
  std::fill_n(mean, width, 0.0f);
  std::fill_n(square, width, 0.0f);
  int64_t count = 0;
  for (int64_t j = 0; j < size_; ++j) {
    if (!shown(allowed, j)) continue;
    ++count;
    for (int64_t d = 0; d < width; ++d) mean[d] += rows[j * stride + d];
  }
  count = std::max<int64_t>(count, 1);
  for (int64_t d = 0; d < width; ++d) mean[d] /= static_cast<float>(count);
  for (int64_t j = 0; j < size_; ++j) {
    if (!shown(allowed, j)) continue;
    for (int64_t d = 0; d < width; ++d) {
      const float off = rows[j * stride + d] - mean[d];
      square[d] += off * off;
    }
  }
  float sum = 0.0f;
  for (int64_t d = 0; d < width; ++d) sum += square[d];
  const float unit = std::sqrt(std::max(sum / static_cast<float>(count * width), std::numeric_limits<float>::min()));
  float *features = features_.of(size_ * depth_) + at, *columns = columns_.of(depth_ * stride_) + at * stride_;
  if (size_ < stride_) std::memset(columns, 0, sizeof(float) * width * stride_);
  for (int64_t j = 0; j < size_; ++j) {
    const bool seen = shown(allowed, j);
    for (int64_t d = 0; d < width; ++d) features[j * depth_ + d] = seen ? rows[j * stride + d] / unit : 0.0f;
    for (int64_t d = 0; d < width; ++d) columns[d * stride_ + j] = features[j * depth_ + d];
  }
}

// Lloyd's k-means from evenly spaced keys on; leaves the group of each key, and how many keys there are in each.
inline void Grouper::assign(const uint8_t* allowed) {
  const float* features = features_.of(0);
  float *centres = centres_.of(clusters_ * depth_), *moved = moved_.of(clusters_ * depth_);
  for (int64_t c = 0; c < clusters_; ++c) {
    const auto seed = static_cast<int64_t>((static_cast<float>(c) + 0.5f) * static_cast<float>(size_) /
                                           static_cast<float>(clusters_));
    std::copy_n(features + seed * depth_, depth_, centres + c * depth_);
  }
  int32_t *nearest = nearest_.of(stride_), *counts = counts_.of(clusters_);
  for (int64_t round = 0; round < rounds_; ++round) {
    find_nearest();
    std::fill_n(counts, clusters_, 0);
    for (int64_t j = 0; j < size_; ++j) counts[nearest[j]] += shown(allowed, j);
    if (round == rounds_ - 1) break;
    std::fill_n(moved, clusters_ * depth_, 0.0f);
    for (int64_t j = 0; j < size_; ++j) {
      float* to = moved + nearest[j] * depth_;  // hidden keys are zeros
      for (int64_t d = 0; d < depth_; ++d) to[d] += features[j * depth_ + d];
    }
    for (int64_t c = 0; c < clusters_; ++c)
      for (int64_t d = 0; counts[c] && d < depth_; ++d)
        centres[c * depth_ + d] = moved[c * depth_ + d] / static_cast<float>(counts[c]);
  }
}

// The first of the nearest centres of each key; the first where distances are NaN.
inline void Grouper::find_nearest() {
  const float* rows[kKeys];
  float* products = products_.of(clusters_ * stride_);
  for (int64_t from = 0; from < clusters_; from += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, clusters_ - from);
    for (int64_t c = 0; c < count; ++c) rows[c] = centres_.of(0) + (from + c) * depth_;
    for (int64_t j = 0; j < stride_; j += kPanel)
      multiply_all<kVectors>(rows, count, columns_.of(0) + j, stride_, depth_, products + from * stride_ + j, stride_);
  }
  int32_t* nearest = nearest_.of(0);
  float* least = square_.of(stride_);
  for (int64_t c = 0; c < clusters_; ++c) {
    const float* centre = centres_.of(0) + c * depth_;
    float square = 0.0f;
    for (int64_t d = 0; d < depth_; ++d) square += centre[d] * centre[d];
    for (int64_t j = 0; j < stride_; ++j) {
      const float distance = square - 2.0f * products[c * stride_ + j];
      const bool nearer = c == 0 || distance < least[j];
      nearest[j] = nearer ? static_cast<int32_t>(c) : nearest[j];
      least[j] = nearer ? distance : least[j];
    }
  }
}

// The mean row of each group, zeros where it has none.
inline void Grouper::average(const float* rows, int64_t stride, int64_t width, const uint8_t* allowed, float* means) {
  const int32_t *nearest = nearest_.of(0), *counts = counts_.of(0);
  std::fill_n(means, clusters_ * width, 0.0f);
  for (int64_t j = 0; j < size_; ++j) {
    if (!shown(allowed, j)) continue;
    float* to = means + nearest[j] * width;
    for (int64_t d = 0; d < width; ++d) to[d] += rows[j * stride + d];
  }
  for (int64_t c = 0; c < clusters_; ++c)
    for (int64_t d = 0; d < width; ++d) means[c * width + d] /= static_cast<float>(std::max(counts[c], 1));
}

// The variance of the keys of each group.
inline void Grouper::set_spread(const Block& block) {
  const int32_t *nearest = nearest_.of(0), *counts = counts_.of(0);
  std::fill_n(block.spread, clusters_ * width_, 0.0f);
  for (int64_t j = 0; j < size_; ++j) {
    if (!shown(block.allowed, j)) continue;
    const float *row = block.k + j * block.k_stride, *mean = block.mean + nearest[j] * width_;
    float* to = block.spread + nearest[j] * width_;
    for (int64_t d = 0; d < width_; ++d) to[d] += (row[d] - mean[d]) * (row[d] - mean[d]);
  }
  for (int64_t c = 0; c < clusters_; ++c)
    for (int64_t d = 0; d < width_; ++d)
      block.spread[c * width_ + d] *= factor_ / static_cast<float>(std::max(counts[c], 1));
}

}  // namespace s2o
