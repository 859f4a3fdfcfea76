// Ranks the keys of a prefix for a tile of queries: kernels/reference_sparse.py, `run_scores` and `run_order`.

#pragma once

#include <algorithm>
#include <cmath>
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
  bool shows(int64_t key) const { return !allowed || allowed[key]; }
};

// The groups of like keys of a head, `clusters` in a row for each block; without clusters there are none.
struct Groups {
  const float *k, *spread;  // (P, D), mean keys, and variances of keys over 2 log2(e)
  const int32_t* size;      // (P,), how many keys may be seen
  const int32_t* member;    // the group of each key, in whole chunks of kKeys
  int64_t clusters, block;
  float limit;  // in units of log 2
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
  constexpr int kDigit = 13;  // most bits of one: its counters fit into L1
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
  const int passes = (width + kDigit - 1) / kDigit, digit = (width + passes - 1) / passes;
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

constexpr float kMost = 120.0f;  // shares are cut off at 2 to this, which no sum of them takes to infinity

inline Vec at_most(Vec x, float most) { return x > splat(most) ? splat(most) : x; }

class Ranker {
 public:
  // Room for the mean queries of the parts of all heads (count, D), with the factor of scores in them.
  float* start(int64_t count, int64_t width) {
    count_ = count;
    return means_.of(count * width);
  }

  // Sorts `order`, runs of the prefix by rising position, by falling score.
  void sort(const Prefix& prefix, const Groups& groups, int64_t run, std::vector<int32_t>& order) {
    if (groups.clusters)
      weigh_groups(prefix, groups);
    else
      weigh_keys(prefix);
    sorter_.sort(score_runs(prefix, score_keys(prefix, groups), run), order);
  }

 private:
  void weigh_groups(const Prefix& prefix, const Groups& groups);
  void weigh_keys(const Prefix& prefix);
  void multiply_keys(const Prefix& prefix, int64_t chunk);
  const float* score_keys(const Prefix& prefix, const Groups& groups);
  const float* score_runs(const Prefix& prefix, const float* keys, int64_t run);

  int64_t count_ = 0, stride_ = 0;  // of means, and of means in whole vectors
  Buffer means_;
  Buffer total_;                   // (count,), the log-mass of the prefix
  Buffer share_;                   // (groups of the prefix, stride), of one key of each
  Buffer columns_, squares_;       // (D, stride) of means
  Buffer spread_, top_, sum_;      // (groups, stride), (stride,) twice
  Buffer logits_, score_, run_score_;  // (count, kKeys), (keys of the prefix in whole chunks,), (runs,)
  std::vector<const float*> rows_;
  Sorter sorter_;
};

// Sets the totals of all means and the shares of one key of each group.
inline void Ranker::weigh_groups(const Prefix& prefix, const Groups& groups) {
  const int64_t first = prefix.low / groups.block * groups.clusters;
  const int64_t count = prefix.high / groups.block * groups.clusters - first, width = prefix.width;
  stride_ = (count_ + kLanes - 1) / kLanes * kLanes;
  float *columns = columns_.of(width * stride_), *squares = squares_.of(width * stride_);
  transpose(means_.of(0), width, count_, width, columns, stride_);
  for (int64_t i = 0; i < width * stride_; i += kLanes) vec(squares + i) = vec(columns + i) * vec(columns + i);
  float *share = share_.of(count * stride_), *spread = spread_.of(count * stride_);
  float *top = top_.of(stride_), *sum = sum_.of(stride_), *total = total_.of(stride_);
  rows_.resize(count);
  for (int64_t g = 0; g < count; ++g) rows_[g] = groups.k + (first + g) * width;
  for (int64_t i = 0; i < stride_; i += kLanes)
    multiply_all<1>(rows_.data(), count, columns + i, stride_, width, share + i, stride_);
  for (int64_t g = 0; g < count; ++g) rows_[g] = groups.spread + (first + g) * width;
  for (int64_t i = 0; i < stride_; i += kLanes)
    multiply_all<1>(rows_.data(), count, squares + i, stride_, width, spread + i, stride_);
  std::fill_n(top, stride_, kHidden);
  std::fill_n(sum, stride_, 0.0f);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t i = 0; i < stride_; i += kLanes) {
      Vec& x = vec(share + g * stride_ + i);
      const Vec more = vec(spread + g * stride_ + i), limit = splat(groups.limit);
      x += more > limit ? limit : more;
      if (groups.size[first + g]) vec(top + i) = x > vec(top + i) ? x : vec(top + i);
    }
  for (int64_t g = 0; g < count; ++g) {
    if (!groups.size[first + g]) continue;
    const auto size = static_cast<float>(groups.size[first + g]);
    for (int64_t i = 0; i < stride_; i += kLanes)
      vec(sum + i) += exp2_of(vec(share + g * stride_ + i) - vec(top + i)) * size;
  }
  for (int64_t i = 0; i < stride_; ++i) total[i] = top[i] + std::log2(sum[i]);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t i = 0; i < stride_; i += kLanes) {
      Vec& x = vec(share + g * stride_ + i);
      x = exp2_of(at_most(x - vec(total + i), kMost));
    }
}

// Sets the totals where there are no groups: of the keys themselves, which are then multiplied twice.
inline void Ranker::weigh_keys(const Prefix& prefix) {
  float *top = top_.of(count_ * kLanes), *sum = sum_.of(count_ * kLanes), *total = total_.of(count_);
  std::fill_n(top, count_ * kLanes, kHidden);
  std::fill_n(sum, count_ * kLanes, 0.0f);
  for (int64_t chunk = prefix.low / kKeys; chunk * kKeys < prefix.high; ++chunk) {
    multiply_keys(prefix, chunk);
    for (int64_t i = 0; i < count_; ++i) {
      float* logit = logits_.of(0) + i * kKeys;
      for (int64_t j = 0, key = chunk * kKeys; j < kKeys; ++j, ++key)
        if (key < prefix.low || key >= prefix.high || !prefix.shows(key)) logit[j] = kHidden;
      Vec peak = vec(top + i * kLanes);
      for (int64_t j = 0; j < kKeys; j += kLanes) peak = vec(logit + j) > peak ? vec(logit + j) : peak;
      const Vec base = peak == splat(kHidden) ? Vec{} : peak;
      Vec mass = vec(sum + i * kLanes) * exp2_of(vec(top + i * kLanes) - base);
      for (int64_t j = 0; j < kKeys; j += kLanes) mass += exp2_of(vec(logit + j) - base);
      vec(top + i * kLanes) = peak, vec(sum + i * kLanes) = mass;
    }
  }
  for (int64_t i = 0; i < count_; ++i) {
    const float* peak = top + i * kLanes;
    const float most = *std::max_element(peak, peak + kLanes);
    total[i] = most + std::log2(lane_sum(vec(sum + i * kLanes) * exp2_of(vec(peak) - most)));
  }
}

// The logits (count, kKeys) of one chunk of keys. Where there are few means, more vectors of keys at a time keep as
// many sums going.
inline void Ranker::multiply_keys(const Prefix& prefix, int64_t chunk) {
  const float* columns = prefix.columns + chunk * kKeys * prefix.width;
  float* logits = logits_.of(count_ * kKeys);
  rows_.resize(count_);
  for (int64_t i = 0; i < count_; ++i) rows_[i] = means_.of(0) + i * prefix.width;
  if (count_ < kRows)
    for (int64_t j = 0; j < kKeys; j += 4 * kLanes)
      multiply_all<4>(rows_.data(), count_, columns + j, kKeys, prefix.width, logits + j, kKeys);
  else
    for (int64_t j = 0; j < kKeys; j += 2 * kLanes)
      multiply_all<2>(rows_.data(), count_, columns + j, kKeys, prefix.width, logits + j, kKeys);
}

// Of each key of the prefix the sum over means of how far its share is from that of one key of its group; 0 where it is
// hidden.
inline const float* Ranker::score_keys(const Prefix& prefix, const Groups& groups) {
  const int64_t first = prefix.low / kKeys, chunks = (prefix.high + kKeys - 1) / kKeys - first;
  float* score = score_.of(chunks * kKeys);
  for (int64_t chunk = first; chunk < first + chunks; ++chunk) {
    multiply_keys(prefix, chunk);
    int64_t group = 0, end = 0;  // the groups that keys of the chunk can be in
    if (groups.clusters) {
      group = std::max(prefix.low, chunk * kKeys) / groups.block * groups.clusters;
      end = (std::min(prefix.high, (chunk + 1) * kKeys) - 1) / groups.block * groups.clusters + groups.clusters;
    }
    const float* share = share_.of(0) + (group - prefix.low / groups.block * groups.clusters) * stride_;
    float* to = score + (chunk - first) * kKeys;
    for (int64_t j = 0; j < kKeys; j += kLanes) {
      Bits member = {};
      if (group < end) std::memcpy(&member, groups.member + chunk * kKeys + j, sizeof member);
      Vec sum = {};
      for (int64_t i = 0; i < count_; ++i) {
        const Vec x = exp2_of(at_most(vec(logits_.of(0) + i * kKeys + j) - total_.of(0)[i], kMost));
        Vec like = {};
        for (int64_t g = group; g < end; ++g)
          like = member == static_cast<int32_t>(g) ? splat(share[(g - group) * stride_ + i]) : like;
        sum += x > like ? x - like : like - x;  // NaN stays NaN
      }
      vec(to + j) = sum;
    }
    if (prefix.allowed)
      for (int64_t j = 0; j < kKeys; ++j)
        if (chunk * kKeys + j >= prefix.high || !prefix.allowed[chunk * kKeys + j]) to[j] = 0.0f;
  }
  return score + (prefix.low - first * kKeys);
}

// The largest score of each run's keys, 0 for keys that may not be seen, or half that of a run beside it if that is more.
// A run without keys that may be seen is not ordered, and what it has here does not matter.
inline const float* Ranker::score_runs(const Prefix& prefix, const float* keys, int64_t run) {
  const int64_t runs = (prefix.high - prefix.low) / run;
  float* score = run_score_.of(runs);
  for (int64_t r = 0; r < runs; ++r) {
    float most = 0.0f;
    for (int64_t j = r * run; j < (r + 1) * run; ++j) most = std::max(most, keys[j]);
    score[r] = most;
  }
  float before = 0.0f;
  for (int64_t r = 0; r < runs; ++r) {
    const float own = score[r], after = r + 1 < runs ? score[r + 1] : 0.0f;
    score[r] = std::max(own, 0.5f * std::max(before, after));
    before = own;
  }
  return score;
}

}  // namespace s2o
