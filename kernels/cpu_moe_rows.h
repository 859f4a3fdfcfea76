// What surrounds the products of experts with many rows: activations and weighted sums, each in one pass.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_moe_hidden.h"
#include "cpu_moe_products.h"
#include "cpu_threads.h"

// Filled by kernels/moe_cpu_native.py. Tensors are contiguous, float32 or bfloat16.
struct HiddenRows {
  const void* pre;       // (rows, I) or (rows, 2 I), with gate "separate" the gate's columns first
  const float* weights;  // (rows), factors of the result, or null
  void* hidden;          // (rows, I)
  int64_t rows, inner, bytes, threads;
  s2o::Formula formula;
};

struct Sums {
  const void* y;         // (T * K, l)
  const int64_t* place;  // (T * K), which row of y a choice has
  const float* weights;  // (T * K), or null
  void* output;          // (T, l)
  int64_t tokens, choices, width, bytes, threads;
};

namespace s2o {

constexpr int64_t kTask = 1 << 14;  // numbers worth a task of their own

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Rounds to the nearest, ties to even.
inline void store(BFloat16* to, Vec x) {
  const Words bits = (Words)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Shorts high = __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Shorts);
  std::memcpy(to, &high, sizeof high);
}

// Vectors of `count` numbers, the last of them filled up with zeros.
template <class W>
inline Vec load_some(const W* from, int64_t count) {
  if (count >= kLanes) return load(from);
  W numbers[kLanes] = {};
  std::memcpy(numbers, from, sizeof(W) * count);
  return load(numbers);
}

template <class W>
inline void store_some(W* to, Vec x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  W numbers[kLanes];
  store(numbers, x);
  std::memcpy(to, numbers, sizeof(W) * count);
}

// Calls work(from, to) for shares of `rows` rows of `width` numbers.
template <class Work>
void share_rows(int64_t threads, int64_t rows, int64_t width, const Work& work) {
  const int64_t step = std::max<int64_t>(1, kTask / std::max<int64_t>(1, width));
  on_team(threads, (rows + step - 1) / step,
          [&](int64_t task) { work(task * step, std::min(rows, (task + 1) * step)); });
}

template <class W, class Expert>
void activate_rows(const HiddenRows& p, const Expert& expert) {
  const Gate gate = p.formula.gate;
  const int64_t gate_at = gate == Gate::kHalfSwapped ? p.inner : 0, up_at = p.inner - gate_at;
  share_rows(p.threads, p.rows, p.inner, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const W* pre = static_cast<const W*>(p.pre) + r * p.inner * (gate == Gate::kNone ? 1 : 2);
      W* hidden = static_cast<W*>(p.hidden) + r * p.inner;
      const Vec weight = splat(p.weights ? p.weights[r] : 1.0f);
      for (int64_t i = 0; i < p.inner; i += kLanes) {
        const int64_t count = p.inner - i;
        Vec x;
        if (gate == Gate::kNone) {
          x = expert(load_some(pre + i, count));
        } else if (gate == Gate::kInterleaved) {
          Vec first = {}, second = {};
          for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane)
            first[lane] = widen(pre + 2 * (i + lane)), second[lane] = widen(pre + 2 * (i + lane) + 1);
          x = expert(first, second);
        } else {
          x = expert(load_some(pre + gate_at + i, count), load_some(pre + up_at + i, count));
        }
        store_some(hidden + i, x * weight, count);
      }
    }
  });
}

template <class W>
void sum_choices(const Sums& p) {
  share_rows(p.threads, p.tokens, p.width * p.choices, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t* place = p.place + token * p.choices;
      for (int64_t i = 0; i < p.width; i += kLanes) {
        Vec sum = {};
        for (int64_t k = 0; k < p.choices; ++k) {
          const Vec y = load_some(static_cast<const W*>(p.y) + place[k] * p.width + i, p.width - i);
          sum += y * (p.weights ? p.weights[token * p.choices + k] : 1.0f);
        }
        store_some(static_cast<W*>(p.output) + token * p.width + i, sum, p.width - i);
      }
    }
  });
}

}  // namespace s2o
