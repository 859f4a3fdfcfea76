// Ranks the keys of a prefix for a tile of queries: kernels/reference_sparse.py, `token_scores` and `token_order`.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu_vectors.h"

namespace s2o {

// The keys [0, length) of a prefix, in rows `stride` apart; `allowed` is null, or tells which may be seen.
struct Prefix {
  const float* k;
  int64_t stride, length, width;
  const uint8_t* allowed;
};

class Ranker {
 public:
  // Room for the sub-mean queries, zeros: feature d of the i-th at [d * stride() + i].
  float* start(int64_t count, int64_t width) {
    count_ = count, vectors_ = (count + kLanes - 1) / kLanes;
    float* means = means_.of(width * stride());
    std::memset(means, 0, sizeof(float) * width * stride());
    return means;
  }
  int64_t stride() const { return vectors_ * kLanes; }

  // Sorts `order`, positions in the prefix by rising position, by falling score.
  void sort(const Prefix& prefix, int64_t smoothing, std::vector<int32_t>& order) {
    sort_by_score(smooth(score(prefix), prefix.length, smoothing), order);
  }

 private:
  float* score(const Prefix& prefix);
  void weigh(const Prefix& prefix, int64_t chunk);
  float* smooth(const float* score, int64_t length, int64_t smoothing);
  void sort_by_score(const float* scores, std::vector<int32_t>& order);

  int64_t count_ = 0, vectors_ = 0;
  Buffer means_, weights_, peaks_, sums_, score_, smooth_;
  std::vector<int32_t> starts_;
  std::vector<uint64_t> entries_, swap_;
};

// The weights of one chunk of keys, relative to the peaks up to and with this chunk, and the sums so far relative to
// the same peaks. `score` sets them right: so a score costs one exponential.
inline void Ranker::weigh(const Prefix& prefix, int64_t chunk) {
  const int64_t from = chunk * kKeys, count = std::min<int64_t>(kKeys, prefix.length - from);
  const float* means = means_.of(0);
  float *weight = weights_.of(0) + from * stride(), *sums = sums_.of(0);
  float *before = peaks_.of(0) + chunk * stride(), *after = before + stride();
  const float* rows[kKeys];
  for (int64_t j = 0; j < count; ++j) rows[j] = prefix.k + (from + j) * prefix.stride;
  int64_t c = 0;
  for (; c + 4 <= vectors_; c += 4)
    multiply_all<4>(rows, count, means + c * kLanes, stride(), prefix.width, weight + c * kLanes, stride());
  for (; c + 2 <= vectors_; c += 2)
    multiply_all<2>(rows, count, means + c * kLanes, stride(), prefix.width, weight + c * kLanes, stride());
  if (c < vectors_)
    multiply_all<1>(rows, count, means + c * kLanes, stride(), prefix.width, weight + c * kLanes, stride());
  if (prefix.allowed)
    for (int64_t j = 0; j < count; ++j)
      if (!prefix.allowed[from + j]) std::fill_n(weight + j * stride(), stride(), kHidden);
  for (c = 0; c < stride(); c += kLanes) {
    Vec top = vec(before + c), sum = {};
    for (int64_t j = 0; j < count; ++j) {
      const Vec x = vec(weight + j * stride() + c);
      top = x > top ? x : top;
    }
    vec(after + c) = top;
    const Vec base = top == splat(kHidden) ? Vec{} : top;
    for (int64_t j = 0; j < count; ++j) {
      Vec& x = vec(weight + j * stride() + c);
      x = exp2_of(x - base);
      sum += x;
    }
    vec(sums + c) = vec(sums + c) * exp2_of(vec(before + c) - base) + sum;
  }
}

// The mean over sub-means of their softmax over the prefix, up to a factor.
inline float* Ranker::score(const Prefix& prefix) {
  const int64_t chunks = (prefix.length + kKeys - 1) / kKeys;
  float *peaks = peaks_.of((chunks + 1) * stride()), *sums = sums_.of(stride());
  float *weight = weights_.of(prefix.length * stride()), *score = score_.of(prefix.length);
  std::fill_n(peaks, stride(), kHidden);
  std::fill_n(sums, stride(), 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) weigh(prefix, chunk);
  for (int64_t i = 0; i < stride(); ++i) sums[i] = i < count_ ? 1.0f / sums[i] : 0.0f;
  const float* last = peaks + chunks * stride();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float* factor = peaks + chunk * stride();  // no longer needed as peaks
    const float* peak = factor + stride();
    for (int64_t c = 0; c < stride(); c += kLanes) {
      // No peak yet means that no key could be seen yet: the weights are 0.
      const Vec shrink = exp2_of(vec(peak + c) - vec(last + c)) * vec(sums + c);
      vec(factor + c) = vec(peak + c) == splat(kHidden) ? Vec{} : shrink;
    }
    for (int64_t j = chunk * kKeys; j < std::min(prefix.length, (chunk + 1) * kKeys); ++j) {
      Vec sum = {};
      for (int64_t c = 0; c < stride(); c += kLanes) sum += vec(weight + j * stride() + c) * vec(factor + c);
      score[j] = lane_sum(sum);
    }
  }
  return score;
}

// The average over `smoothing` neighbours, fewer at the ends.
inline float* Ranker::smooth(const float* score, int64_t length, int64_t smoothing) {
  const int64_t reach = smoothing / 2;
  float* smooth = smooth_.of(length);
  std::fill_n(smooth, length, 0.0f);
  for (int64_t shift = -reach; shift <= reach; ++shift)
    for (int64_t j = std::max<int64_t>(0, -shift); j < std::min(length, length - shift); ++j)
      smooth[j] += score[j + shift];
  for (int64_t j = 0; j < length; ++j) {
    if (j == reach) j = std::max(j, length - reach);  // between the ends the factor is the same for all
    if (j >= length) break;
    const int64_t count = std::min(j, reach) + std::min(length - 1 - j, reach) + 1;
    smooth[j] *= static_cast<float>(smoothing) / static_cast<float>(count);
  }
  return smooth;
}

// A stable radix sort: scores are not negative, so that their bits rise with them, and equal ones stay by position.
// NaN counts as the largest. An entry holds the bits of the score above the position.
inline void Ranker::sort_by_score(const float* scores, std::vector<int32_t>& order) {
  constexpr int kMost = 13;  // bits of a digit: its counters fit into L1
  const size_t count = order.size();
  entries_.resize(count), swap_.resize(count);
  uint32_t largest = 0, smallest = ~0u;
  for (size_t i = 0; i < count; ++i) {
    const float score = scores[order[i]];
    uint32_t bits = 0;
    std::memcpy(&bits, &score, sizeof bits);
    if (!(score >= 0.0f)) bits = 0x7fffffffu;
    largest = std::max(largest, bits), smallest = std::min(smallest, bits);
    entries_[i] = uint64_t{bits} << 32 | static_cast<uint32_t>(order[i]);
  }
  int width = 1;
  while (width < 32 && (largest - smallest) >> width) ++width;
  const int passes = (width + kMost - 1) / kMost, digit = (width + passes - 1) / passes;
  for (int pass = 0; pass < passes; ++pass) {
    const auto bucket = [&](uint64_t entry) {
      return (largest - static_cast<uint32_t>(entry >> 32)) >> pass * digit & ((1u << digit) - 1);
    };
    starts_.assign(size_t{1} << digit, 0);
    for (size_t i = 0; i < count; ++i) ++starts_[bucket(entries_[i])];
    int32_t next = 0;
    for (int32_t& start : starts_) next += std::exchange(start, next);
    for (size_t i = 0; i < count; ++i) swap_[starts_[bucket(entries_[i])]++] = entries_[i];
    entries_.swap(swap_);
  }
  for (size_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(entries_[i]);
}

}  // namespace s2o
