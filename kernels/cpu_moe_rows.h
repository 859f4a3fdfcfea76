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

struct HiddenGradients {
  const void *pre, *grad;  // as above, and (rows, I), of the hidden rows with their weights
  const float* weights;    // (rows), or null
  void *grad_pre, *hidden; // like pre, and (rows, I), the hidden rows with their weights once more
  float* grad_weights;     // (rows)
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

// The first `count` lanes; what an activation makes of the zeros behind them need not be finite.
inline Vec keep_first(Vec x, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) x[lane] = 0.0f;
  return x;
}

// Calls work(from, to) for shares of `rows` rows of `width` numbers.
template <class Work>
void share_rows(int64_t threads, int64_t rows, int64_t width, const Work& work) {
  const int64_t step = std::max<int64_t>(1, kTask / std::max<int64_t>(1, width));
  on_team(threads, (rows + step - 1) / step,
          [&](int64_t task) { work(task * step, std::min(rows, (task + 1) * step)); });
}

// Where gate and up lie in a row of first products, and how a vector of each is read and written.
class Halves {
 public:
  Halves(Gate gate, int64_t inner)
      : gated(gate != Gate::kNone), width(inner * (gated ? 2 : 1)), interleaved_(gate == Gate::kInterleaved),
        gate_at_(gate == Gate::kHalfSwapped ? inner : 0), up_at_(inner - gate_at_) {}

  template <class W>
  void read(const W* row, int64_t i, int64_t count, Vec* gate, Vec* up) const {
    if (!interleaved_) {
      *gate = load_some(row + gate_at_ + i, count);
      if (gated) *up = load_some(row + up_at_ + i, count);
      return;
    }
    *gate = *up = Vec{};
    for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane)
      (*gate)[lane] = widen(row + 2 * (i + lane)), (*up)[lane] = widen(row + 2 * (i + lane) + 1);
  }

  template <class W>
  void write(W* row, int64_t i, int64_t count, Vec gate, Vec up) const {
    if (!interleaved_) {
      store_some(row + gate_at_ + i, gate, count);
      if (gated) store_some(row + up_at_ + i, up, count);
      return;
    }
    W gates[kLanes], ups[kLanes];
    store(gates, gate), store(ups, up);
    for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes); ++lane)
      row[2 * (i + lane)] = gates[lane], row[2 * (i + lane) + 1] = ups[lane];
  }

  const bool gated;
  const int64_t width;

 private:
  const bool interleaved_;
  const int64_t gate_at_, up_at_;
};

template <class W, class Expert>
void activate_rows(const HiddenRows& p, const Expert& expert) {
  const Halves halves(p.formula.gate, p.inner);
  share_rows(p.threads, p.rows, p.inner, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const W* pre = static_cast<const W*>(p.pre) + r * halves.width;
      W* hidden = static_cast<W*>(p.hidden) + r * p.inner;
      const Vec weight = splat(p.weights ? p.weights[r] : 1.0f);
      for (int64_t i = 0; i < p.inner; i += kLanes) {
        Vec gate, up = {};
        halves.read(pre, i, p.inner - i, &gate, &up);
        store_some(hidden + i, (halves.gated ? expert(gate, up) : expert(gate)) * weight, p.inner - i);
      }
    }
  });
}

template <class W, class Expert>
void differentiate_rows(const HiddenGradients& p, const Expert& expert) {
  const Halves halves(p.formula.gate, p.inner);
  share_rows(p.threads, p.rows, p.inner, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const W* pre = static_cast<const W*>(p.pre) + r * halves.width;
      const W* grad = static_cast<const W*>(p.grad) + r * p.inner;
      W *grad_pre = static_cast<W*>(p.grad_pre) + r * halves.width, *hidden = static_cast<W*>(p.hidden) + r * p.inner;
      const Vec weight = splat(p.weights ? p.weights[r] : 1.0f);
      Vec sum = {};
      for (int64_t i = 0; i < p.inner; i += kLanes) {
        const int64_t count = p.inner - i;
        Vec gate, up = {};
        halves.read(pre, i, count, &gate, &up);
        const Vec dh = load_some(grad + i, count), h = halves.gated ? expert(gate, up) : expert(gate);
        sum += count >= kLanes ? dh * h : keep_first(dh * h, count);
        if (halves.gated)
          expert.differentiate(dh * weight, &gate, &up);
        else
          gate = expert.differentiate(dh * weight, gate);
        halves.write(grad_pre, i, count, gate, up);
        store_some(hidden + i, h * weight, count);
      }
      float total;
      sum_lanes<1>(&sum, &total);
      p.grad_weights[r] = total;
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
