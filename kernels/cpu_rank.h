// Ranks the keys of a prefix for a tile of queries: kernels/reference_sparse.py, `token_scores` and `token_order`.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu_vectors.h"

namespace s2o {

// The keys [low, high) of a prefix, in columns (D, kKeys) as `transpose` makes them of each kKeys of all keys;
// `allowed` is null, or tells which of all keys may be seen.
struct Prefix {
  const float* columns;
  int64_t low, high, width;
  const uint8_t* allowed;
};

class Sorter {
 public:
  // Sorts `order`, positions by rising position, by falling score.
  void sort(const float* scores, std::vector<int32_t>& order);

 private:
  std::vector<int32_t> starts_;
  std::vector<uint64_t> entries_, swap_;
};

// A stable radix sort: scores are not negative, so that their bits rise with them, and equal ones stay by position.
// NaN counts as the largest. An entry holds the bits of the score above the position.
inline void Sorter::sort(const float* scores, std::vector<int32_t>& order) {
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

class Ranker {
 public:
  // Room for the sub-mean queries (count, D), with the factor of scores in them; zeros.
  float* start(int64_t count, int64_t width) {
    count_ = count;
    float* means = means_.of(count * width);
    std::memset(means, 0, sizeof(float) * count * width);
    return means;
  }
  const float* means() { return means_.of(0); }

  // Sorts `order`, positions in the prefix by rising position, by falling score.
  void sort(const Prefix& prefix, int64_t smoothing, std::vector<int32_t>& order) {
    sorter_.sort(smooth(score(prefix), prefix.high - prefix.low, smoothing), order);
  }

 private:
  float* score(const Prefix& prefix);
  void weigh(const Prefix& prefix, int64_t chunk, float* logits, float* tops);
  float* smooth(const float* score, int64_t length, int64_t smoothing);
  int64_t count_ = 0;
  Buffer means_, weights_, tops_, sums_, score_, smooth_;
  std::vector<const float*> rows_;
  Sorter sorter_;
};

// The logits (sub-means, kKeys) of one chunk of keys, and with those before the largest of each sub-mean in each lane.
inline void Ranker::weigh(const Prefix& prefix, int64_t chunk, float* logits, float* tops) {
  const float* columns = prefix.columns + chunk * kKeys * prefix.width;
  for (int64_t j = 0; j < kKeys; j += 2 * kLanes)  // eight sub-means are one block of rows
    multiply_all<2>(rows_.data(), count_, columns + j, kKeys, prefix.width, logits + j, kKeys);
  const int64_t from = chunk * kKeys;
  if (prefix.allowed || from < prefix.low || from + kKeys > prefix.high)
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t key = from + j;
      if (key >= prefix.low && key < prefix.high && (!prefix.allowed || prefix.allowed[key])) continue;
      for (int64_t i = 0; i < count_; ++i) logits[i * kKeys + j] = kHidden;
    }
  for (int64_t i = 0; i < count_; ++i) {
    Vec top = vec(tops + i * kLanes);
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      const Vec x = vec(logits + i * kKeys + j);
      top = x > top ? x : top;
    }
    vec(tops + i * kLanes) = top;
  }
}

// The mean over sub-means of their softmax over the prefix, up to a factor.
inline float* Ranker::score(const Prefix& prefix) {
  const int64_t first = prefix.low / kKeys, chunks = (prefix.high + kKeys - 1) / kKeys - first;
  float *weights = weights_.of(chunks * count_ * kKeys), *score = score_.of(chunks * kKeys);
  float *tops = tops_.of(count_ * kLanes), *sums = sums_.of(count_ * kLanes);
  rows_.resize(count_);
  for (int64_t i = 0; i < count_; ++i) rows_[i] = means_.of(0) + i * prefix.width;
  std::fill_n(tops, count_ * kLanes, kHidden);
  std::fill_n(sums, count_ * kLanes, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    weigh(prefix, first + chunk, weights + chunk * count_ * kKeys, tops);
  for (int64_t i = 0; i < count_; ++i) {
    const float top = *std::max_element(tops + i * kLanes, tops + (i + 1) * kLanes);
    vec(tops + i * kLanes) = splat(top == kHidden ? 0.0f : top);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < count_; ++i) {
      float* weight = weights + (chunk * count_ + i) * kKeys;
      Vec sum = vec(sums + i * kLanes);
      for (int64_t j = 0; j < kKeys; j += kLanes) {
        vec(weight + j) = exp2_of(vec(weight + j) - vec(tops + i * kLanes));
        sum += vec(weight + j);
      }
      vec(sums + i * kLanes) = sum;
    }
  for (int64_t i = 0; i < count_; ++i) vec(sums + i * kLanes) = splat(1.0f / lane_sum(vec(sums + i * kLanes)));
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      Vec sum = {};
      for (int64_t i = 0; i < count_; ++i)
        sum += vec(weights + (chunk * count_ + i) * kKeys + j) * vec(sums + i * kLanes);
      vec(score + chunk * kKeys + j) = sum;
    }
  return score + (prefix.low - first * kKeys);
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

}  // namespace s2o
