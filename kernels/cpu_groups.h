// Puts the keys of a block into groups of like keys: kernels/tail_groups.py, `tail_groups`, which says what and why.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu_vectors.h"

namespace s2o {

// The keys of a block with their values, zeros where they are hidden, `allowed` null or which of them are not, and
// where its groups go: `first` is the number of the first of them.
struct Block {
  const float *k, *v;
  int64_t k_stride, v_stride;
  const uint8_t* allowed;
  int32_t first;
  int32_t* member;                // (size,)
  int32_t* count;                 // (clusters,), keys of each that are not hidden
  float *mean, *spread, *mean_v;  // (clusters, D), (clusters, D), (clusters, Dv)
};

// Features are keys and values, each over the root mean square of their deviation from their mean in the block. They
// are never made: their products with a centre are those of keys and values with a mean divided twice.
class Grouper {
 public:
  // Of every block: its keys, and the sizes of `Geometry`. Variances are multiplied by `factor`.
  Grouper(int64_t size, int64_t width, int64_t value_width, int64_t clusters, int64_t rounds, float factor)
      : size_(size), width_(width), value_width_(value_width), clusters_(clusters), rounds_(rounds), factor_(factor),
        depth_(width + value_width), stride_((size + kPanel - 1) / kPanel * kPanel) {}

  void group(const Block& block) {
    const float unit = inverse_square(block.k, block.k_stride, width_, block.allowed);
    const float unit_v = inverse_square(block.v, block.v_stride, value_width_, block.allowed);
    float* columns = columns_.of(depth_ * stride_);
    transpose(block.k, block.k_stride, size_, width_, columns, stride_);
    transpose(block.v, block.v_stride, size_, value_width_, columns + width_ * stride_, stride_);
    for (int64_t c = 0; c < clusters_; ++c) {
      const auto seed = static_cast<int64_t>((static_cast<float>(c) + 0.5f) * static_cast<float>(size_) /
                                             static_cast<float>(clusters_));
      std::copy_n(block.k + seed * block.k_stride, width_, block.mean + c * width_);
      std::copy_n(block.v + seed * block.v_stride, value_width_, block.mean_v + c * value_width_);
    }
    for (int64_t round = 0; round < rounds_; ++round) {  // Lloyd's k-means
      find_nearest(block, unit, unit_v);
      count(block.allowed);
      const bool last = round == rounds_ - 1;  // then a group without keys has no mean, before it kept its own
      average(block.k, block.k_stride, width_, block.mean, last);
      average(block.v, block.v_stride, value_width_, block.mean_v, last);
    }
    for (int64_t j = 0; j < size_; ++j) block.member[j] = block.first + nearest_.of(0)[j];
    std::copy_n(counts_.of(0), clusters_, block.count);
    set_spread(block);
  }

 private:
  static bool shown(const uint8_t* allowed, int64_t j) { return !allowed || allowed[j]; }
  float inverse_square(const float* rows, int64_t stride, int64_t width, const uint8_t* allowed);
  void find_nearest(const Block& block, float unit, float unit_v);
  void count(const uint8_t* allowed);
  void average(const float* rows, int64_t stride, int64_t width, float* means, bool last);
  void set_spread(const Block& block);

  const int64_t size_, width_, value_width_, clusters_, rounds_;
  const float factor_;
  const int64_t depth_, stride_;
  Buffer columns_, scaled_, products_;  // (D + Dv, stride) of keys and values, (clusters, D + Dv), (clusters, stride)
  Buffer sum_, square_;
  Array<int32_t> nearest_, counts_;  // the group of each key, counted from 0, and how many keys each has
};

// 1 over the mean square of the deviation of rows from their mean.
inline float Grouper::inverse_square(const float* rows, int64_t stride, int64_t width, const uint8_t* allowed) {
  float *mean = sum_.of(width), *square = square_.of(width);
  std::fill_n(mean, width, 0.0f);
  std::fill_n(square, width, 0.0f);
  int64_t count = 0;
  for (int64_t j = 0; j < size_; ++j) {
    count += shown(allowed, j);
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
  return 1.0f / std::max(sum / static_cast<float>(count * width), std::numeric_limits<float>::min());
}

// The first of the nearest centres of each key; the first centre where distances are NaN.
inline void Grouper::find_nearest(const Block& block, float unit, float unit_v) {
  float *scaled = scaled_.of(clusters_ * depth_), *products = products_.of(clusters_ * stride_);
  for (int64_t c = 0; c < clusters_; ++c) {
    float* to = scaled + c * depth_;
    for (int64_t d = 0; d < width_; ++d) to[d] = block.mean[c * width_ + d] * unit;
    for (int64_t d = 0; d < value_width_; ++d) to[width_ + d] = block.mean_v[c * value_width_ + d] * unit_v;
  }
  const float* rows[kKeys];
  for (int64_t from = 0; from < clusters_; from += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, clusters_ - from);
    for (int64_t c = 0; c < count; ++c) rows[c] = scaled + (from + c) * depth_;
    for (int64_t j = 0; j < stride_; j += kPanel)
      multiply_all<kVectors>(rows, count, columns_.of(0) + j, stride_, depth_, products + from * stride_ + j, stride_);
  }
  int32_t* nearest = nearest_.of(stride_);
  float* least = square_.of(stride_);
  for (int64_t c = 0; c < clusters_; ++c) {
    const float* centre = scaled + c * depth_;
    float square = 0.0f;
    for (int64_t d = 0; d < width_; ++d) square += centre[d] * block.mean[c * width_ + d];
    for (int64_t d = 0; d < value_width_; ++d) square += centre[width_ + d] * block.mean_v[c * value_width_ + d];
    for (int64_t j = 0; j < stride_; ++j) {
      const float distance = square - 2.0f * products[c * stride_ + j];
      const bool nearer = c == 0 || distance < least[j];
      nearest[j] = nearer ? static_cast<int32_t>(c) : nearest[j];
      least[j] = nearer ? distance : least[j];
    }
  }
}

inline void Grouper::count(const uint8_t* allowed) {
  int32_t* counts = counts_.of(clusters_);
  std::fill_n(counts, clusters_, 0);
  for (int64_t j = 0; j < size_; ++j) counts[nearest_.of(0)[j]] += shown(allowed, j);
}

// The mean row of each group; where it has no key, zeros in the `last` round and what there was before it.
inline void Grouper::average(const float* rows, int64_t stride, int64_t width, float* means, bool last) {
  const int32_t *nearest = nearest_.of(0), *counts = counts_.of(0);
  float* sums = sum_.of(clusters_ * width);
  std::fill_n(sums, clusters_ * width, 0.0f);
  for (int64_t j = 0; j < size_; ++j) {
    float* to = sums + nearest[j] * width;
    for (int64_t d = 0; d < width; ++d) to[d] += rows[j * stride + d];
  }
  for (int64_t c = 0; c < clusters_; ++c) {
    if (!counts[c] && !last) continue;
    const float each = 1.0f / static_cast<float>(std::max(counts[c], 1));
    for (int64_t d = 0; d < width; ++d) means[c * width + d] = sums[c * width + d] * each;
  }
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
