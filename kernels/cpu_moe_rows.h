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

constexpr int64_t kPiece = 256;      // columns that are activated at a time
constexpr int64_t kTask = 1 << 14;   // numbers worth a task of their own

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

template <class W>
void activate_rows(const HiddenRows& p) {
  const Formula& formula = p.formula;
  const bool gated = formula.gate != Gate::kNone, interleaved = formula.gate == Gate::kInterleaved;
  const int64_t gate_at = formula.gate == Gate::kHalfSwapped ? p.inner : 0, up_at = p.inner - gate_at;
  share_rows(p.threads, p.rows, p.inner, [&](int64_t begin, int64_t end) {
    alignas(64) float gate[2 * kPiece], up[kPiece];
    for (int64_t r = begin; r < end; ++r) {
      const W* pre = static_cast<const W*>(p.pre) + r * p.inner * (gated ? 2 : 1);
      W* hidden = static_cast<W*>(p.hidden) + r * p.inner;
      const Vec weight = splat(p.weights ? p.weights[r] : 1.0f);
      for (int64_t from = 0; from < p.inner; from += kPiece) {
        const int64_t count = std::min(kPiece, p.inner - from);
        const auto read = [](float* to, const W* numbers, int64_t n) {
          for (int64_t i = 0; i < n; i += kLanes) vec(to + i) = load_some(numbers + i, n - i);
        };
        if (interleaved) {
          read(gate, pre + 2 * from, 2 * count);
          for (int64_t i = 0; i < count; ++i) up[i] = gate[2 * i + 1], gate[i] = gate[2 * i];
        } else {
          read(gate, pre + gate_at + from, count);
          if (gated) read(up, pre + up_at + from, count);
        }
        activate_row(formula, gate, gated ? up : nullptr, count);
        for (int64_t i = 0; i < count; i += kLanes) store_some(hidden + from + i, vec(gate + i) * weight, count - i);
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
