// Foresees how much of its prefix a tile will read, from a sample: kernels/stop_rule.py, `expected_share`.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu_rank.h"
#include "cpu_vectors.h"

namespace s2o {

constexpr int64_t kVoters = 8;  // parts of a tile whose last rows vote

// Of a row's mass, the share that `reach`, not read, would have.
inline float share(float reach, float mass) { return reach == 0.0f ? 0.0f : reach / (mass + reach); }

// A row that votes: its query, the factor of scores in it, and its peak and mass of what was read densely.
struct Voter {
  const float* query;
  float peak, mass;
};

// Sizes of `Geometry`, the heads of a tile and their budgets, and how many keys of the prefix can be seen at all.
struct Outlook {
  int64_t block, bundle, horizon, heads, total;
  const float* budgets;
};

class Forecaster {
 public:
  // Between 0 and 1, the mean of the heads. `means` (count, D) and `voters` belong to the heads in turn, equally many.
  double expect(const Prefix& prefix, const float* means, const std::vector<Voter>& voters, const Outlook& outlook);

 private:
  void sample(const Prefix& prefix, const float* means, const std::vector<Voter>& voters, int64_t block);
  void rank(int64_t count);
  double vote(const Voter* voters, int64_t first, int64_t count, const Outlook& outlook, float budget);

  int64_t count_ = 0, stride_ = 0;  // keys of the sample, and floats between rows of logits
  Buffer logits_, block_, score_;  // (means and voters, stride), (means and voters, kLanes), (stride,)
  std::vector<const float*> rows_;
  std::vector<int32_t> order_;
  std::vector<float> masses_;  // of the voters of a head
  Sorter sorter_;
};

inline double Forecaster::expect(const Prefix& prefix, const float* means, const std::vector<Voter>& voters,
                                const Outlook& outlook) {
  sample(prefix, means, voters, outlook.block);
  if (!count_) return 0.0;
  const auto count = static_cast<int64_t>(voters.size());
  rank(count);
  double sum = 0.0;
  for (int64_t head = 0, each = count / outlook.heads; head < outlook.heads; ++head)
    sum += vote(voters.data() + head * each, count + head * each, each, outlook, outlook.budgets[head]);
  return sum / static_cast<double>(outlook.heads);
}

// Logits of the means, then of the voters, with the sample: a sixteenth of every block.
inline void Forecaster::sample(const Prefix& prefix, const float* means, const std::vector<Voter>& voters,
                               int64_t block) {
  const auto count = static_cast<int64_t>(voters.size());
  rows_.clear();
  for (int64_t i = 0; i < count; ++i) rows_.push_back(means + i * prefix.width);
  for (const Voter& voter : voters) rows_.push_back(voter.query);
  const int64_t run = std::max<int64_t>(1, block / 16), most = (prefix.high - prefix.low) / block * run;
  stride_ = (most + kLanes - 1) / kLanes * kLanes;
  float *logits = logits_.of(2 * count * stride_), *products = block_.of(2 * count * kLanes);
  count_ = 0;
  for (int64_t from = prefix.low; from < prefix.high; from += block)
    for (int64_t at = from; at < from + run; at = (at / kLanes + 1) * kLanes) {
      const int64_t end = std::min((at / kLanes + 1) * kLanes, from + run);
      const float* columns = prefix.columns + at / kKeys * kKeys * prefix.width + at % kKeys / kLanes * kLanes;
      multiply_all<1>(rows_.data(), 2 * count, columns, kKeys, prefix.width, products, kLanes);
      for (int64_t key = at; key < end; ++key) {
        if (!prefix.shows(key)) continue;
        for (int64_t i = 0; i < 2 * count; ++i) logits[i * stride_ + count_] = products[i * kLanes + key % kLanes];
        ++count_;
      }
    }
  for (int64_t i = 0; i < 2 * count; ++i) std::fill(logits + i * stride_ + count_, logits + (i + 1) * stride_, kHidden);
}

inline float largest(const float* x, int64_t count) {
  Vec top = splat(kHidden);
  for (int64_t j = 0; j < count; j += kLanes) top = vec(x + j) > top ? vec(x + j) : top;
  float most = kHidden;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, top[i]);
  return most;
}

// The sample by falling mean of the softmax of `count` means.
inline void Forecaster::rank(int64_t count) {
  float* score = score_.of(stride_);
  std::fill_n(score, stride_, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    float* logit = logits_.of(0) + i * stride_;
    const Vec top = splat(largest(logit, stride_));
    Vec sum = {};
    for (int64_t j = 0; j < stride_; j += kLanes) sum += vec(logit + j) = exp2_of(vec(logit + j) - top);
    const Vec factor = splat(1.0f / lane_sum(sum));
    for (int64_t j = 0; j < stride_; j += kLanes) vec(score + j) += vec(logit + j) * factor;
  }
  order_.resize(count_);
  for (int64_t j = 0; j < count_; ++j) order_[j] = static_cast<int32_t>(j);
  sorter_.sort(score, order_);
}

// The share of the prefix after which all voters of a head stop; their logits begin at row `first`.
inline double Forecaster::vote(const Voter* voters, int64_t first, int64_t count, const Outlook& outlook,
                               float budget) {
  if (!(budget > 0.0f)) return 1.0;
  masses_.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    float* weight = logits_.of(0) + (first + i) * stride_;
    const float peak = voters[i].peak, top = std::max(peak, largest(weight, stride_));
    for (int64_t j = 0; j < stride_; j += kLanes) vec(weight + j) = exp2_of(vec(weight + j) - splat(top));
    masses_[i] = peak == kHidden ? 0.0f : voters[i].mass * exp2_of(splat(peak - top))[0];
  }
  const int64_t total = outlook.total;
  const float stands_for = static_cast<float>(total) / static_cast<float>(count_);
  for (int64_t from = 0, end = outlook.bundle; end < total; end += outlook.bundle) {
    const int64_t to = end * count_ / total;
    const float left = static_cast<float>(total - end) / static_cast<float>(outlook.bundle);
    const float assumed = std::max(left, static_cast<float>(outlook.horizon)) * stands_for;
    bool fine = true;
    for (int64_t i = 0; i < count; ++i) {
      const float* weight = logits_.of(0) + (first + i) * stride_;
      float added = 0.0f;
      for (int64_t j = from; j < to; ++j) added += weight[order_[j]];
      masses_[i] += added * stands_for;
      fine &= share(assumed * added, masses_[i]) <= budget;  // not so for NaN
    }
    if (fine) return static_cast<double>(end) / static_cast<double>(total);
    from = to;
  }
  return 1.0;
}

}  // namespace s2o
