// Products of a few rows with a matrix that is read where it lies, for experts that have few tokens each.
//
// Such a product takes as long as its matrix takes to come from memory, so the matrix is read once, in the order in
// which it lies, and widened to float32 in registers. A number of the result is one sum in one order, whatever rows
// and columns it is computed beside: how work is divided among threads changes no bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu_vectors.h"

namespace s2o {

constexpr int64_t kGroup = 8;  // rows, the most that share what is loaded of a matrix

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), may_alias));

template <class T>
inline T unaligned(const void* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// kLanes numbers from any address, as float32.
inline Vec load(const float* from) { return unaligned<Vec>(from); }

inline Vec load(const BFloat16* from) {
  return (Vec)(__builtin_convertvector(unaligned<Shorts>(from), Words) << 16);
}

inline Vec load(const Float16* from) {
  const Words x = __builtin_convertvector(unaligned<Shorts>(from), Words), magnitude = (x & 0x7fff) << 13;
  const Vec scaled = (Vec)magnitude * splat(0x1p112f);  // moves the bias; right for subnormal numbers, too
  const Words special = (Words)(magnitude >= 0x0f800000) & 0x7f800000;  // infinity and NaN
  return (Vec)((Words)scaled | special | (x & 0x8000) << 16);
}

template <class W>
inline float widen(const W* from) {
  W numbers[kLanes] = {*from};
  return load(numbers)[0];
}
inline float widen(const float* from) { return *from; }

// The last width % kLanes numbers of a row, zeros elsewhere. What is read lies within the row, and where vectors
// overlap, numbers that have been counted are cut off: zero times infinity would be NaN.
class Last {
 public:
  explicit Last(int64_t width) : width_(width), left_(width % kLanes) {
    int32_t lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i >= kLanes - left_ ? -1 : 0;
    std::memcpy(&mask_, lanes, sizeof mask_);
  }
  int64_t left() const { return left_; }
  template <class W>
  Vec of(const W* row) const {
    if (width_ >= kLanes) return (Vec)((Bits)load(row + width_ - kLanes) & mask_);
    W numbers[kLanes] = {};
    std::memcpy(numbers, row, sizeof(W) * width_);
    return load(numbers);
  }

 private:
  int64_t width_, left_;
  Bits mask_;
};

#ifdef S2O_SHUFFLES
// Lanes that are STEP apart added up: where the bit STEP of the lane is 0, those of a, elsewhere those of b.
template <int STEP, size_t... LANE>
inline Vec add_halves(Vec a, Vec b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (LANE & STEP ? kLanes + LANE - STEP : LANE)...) +
         __builtin_shufflevector(a, b, (LANE & STEP ? kLanes + LANE : LANE + STEP)...);
}

template <int STEP, int COUNT>
inline void add_lanes(Vec* x) {
  if constexpr (STEP > 0) {
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    if constexpr (COUNT == 1) x[0] = add_halves<STEP>(x[0], x[0], lanes);
    for (int i = 0; i < COUNT / 2; ++i) x[i] = add_halves<STEP>(x[2 * i], x[2 * i + 1], lanes);
    add_lanes<STEP / 2, (COUNT + 1) / 2>(x);
  }
}

// sums[i] = the sum of the lanes of x[i], for COUNT vectors, a power of 2; in the same order for every COUNT.
template <int COUNT>
inline void sum_lanes(Vec* x, float* sums) {
  add_lanes<kLanes / 2, COUNT>(x);
  for (int i = 0; i < COUNT; ++i) {
    int lane = 0;
    for (int bit = 1, step = kLanes / 2; bit < COUNT; bit *= 2, step /= 2) lane += i & bit ? step : 0;
    sums[i] = x[0][lane];
  }
}
#else
template <int COUNT>
inline void sum_lanes(Vec* x, float* sums) {
  for (int i = 0; i < COUNT; ++i) {
    float lanes[kLanes];
    std::memcpy(lanes, x + i, sizeof lanes);
    for (int step = kLanes / 2; step; step /= 2)
      for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
    sums[i] = lanes[0];
  }
}
#endif

// A matrix (out, in) whose numbers lie `out` and `in` elements apart; one of the two is 1.
template <class W>
struct Matrix {
  const W* data;
  int64_t out, in;
};

// result[r][o] = rows[r] times row o of the matrix, for columns side by side in a row of the matrix.
template <int ROWS, int OUTS, class W>
inline void dots(const float* const* rows, const W* w, int64_t stride, int64_t depth, const Last& last, float* result,
                 int64_t result_stride) {
  constexpr int64_t kAhead = 1024 / sizeof(W);  // a processor's own prefetching stops where a page ends
  Vec sum[ROWS][OUTS] = {};
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    Vec x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = load(rows[r] + d);
    for (int o = 0; o < OUTS; ++o) {
      const W* from = w + o * stride + d;
      __builtin_prefetch(from + kAhead);
      const Vec y = load(from);
      for (int r = 0; r < ROWS; ++r) sum[r][o] += x[r] * y;
    }
  }
  if (last.left())
    for (int o = 0; o < OUTS; ++o) {
      const Vec y = last.of(w + o * stride);
      for (int r = 0; r < ROWS; ++r) sum[r][o] += last.of(rows[r]) * y;
    }
  for (int r = 0; r < ROWS; ++r) sum_lanes<OUTS>(sum[r], result + r * result_stride);
}

// The same where neighbours along `out` are adjacent: a vector of columns at a time. With `count` < kLanes columns,
// VECS is 1, and `before` columns that lie in front of them may be read.
template <int ROWS, int VECS, class W>
inline void columns(const float* const* rows, const W* w, int64_t stride, int64_t depth, int64_t count, int64_t before,
                    float* result, int64_t result_stride) {
  constexpr int64_t kAhead = 8;  // each step is in another page, which a processor does not foresee
  Vec sum[ROWS][VECS] = {};
  const bool whole = count >= kLanes, shifted = !whole && before >= kLanes - count;
  const int64_t shift = shifted ? kLanes - count : 0;
  for (int64_t d = 0; d < depth; ++d) {
    const W* from = w + d * stride - shift;
    Vec y[VECS];
    if (whole || shifted) {
      for (int c = 0; c < VECS; ++c) {
        __builtin_prefetch(from + c * kLanes + kAhead * stride);
        y[c] = load(from + c * kLanes);
      }
    } else {
      W numbers[kLanes] = {};
      std::memcpy(numbers, from, sizeof(W) * count);
      y[0] = load(numbers);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = splat(rows[r][d]);
      for (int c = 0; c < VECS; ++c) sum[r][c] += x * y[c];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < VECS; ++c) {
      float numbers[kLanes], *to = result + r * result_stride + c * kLanes;
      std::memcpy(numbers, &sum[r][c], sizeof numbers);
      std::memcpy(to, numbers + shift, sizeof(float) * std::min<int64_t>(count, kLanes));
    }
}

// ROWS up to 4, or where neighbours along `in` are adjacent up to kGroup.
template <int ROWS, class W>
void multiply_rows(const float* const* rows, const Matrix<W>& m, int64_t begin, int64_t end, int64_t depth,
                   float* result, int64_t result_stride) {
  if (m.in == 1) {
    constexpr int kSums = kLanes >= 16 ? 16 : 8;  // in registers
    constexpr int OUTS = ROWS == 3 ? kSums / 4 : std::min(kSums / 2, kSums / ROWS);
    const Last last(depth);
    int64_t o = begin;
    for (; o + OUTS <= end; o += OUTS)
      dots<ROWS, OUTS>(rows, m.data + o * m.out, m.out, depth, last, result + o - begin, result_stride);
    for (; o < end; ++o)
      dots<ROWS, 1>(rows, m.data + o * m.out, m.out, depth, last, result + o - begin, result_stride);
    return;
  }
  if constexpr (ROWS <= 4) {
    constexpr int VECS = ROWS == 1 ? 4 * kVectors : kVectors;
    int64_t o = begin;
    for (; o + VECS * kLanes <= end; o += VECS * kLanes)
      columns<ROWS, VECS>(rows, m.data + o, m.in, depth, kLanes, o, result + o - begin, result_stride);
    for (; o + kLanes <= end; o += kLanes)
      columns<ROWS, 1>(rows, m.data + o, m.in, depth, kLanes, o, result + o - begin, result_stride);
    if (o < end) columns<ROWS, 1>(rows, m.data + o, m.in, depth, end - o, o, result + o - begin, result_stride);
  }
}

// result[r] = rows[r] (depth) times the matrix, for columns [begin, end) and `count` rows up to kGroup.
template <class W>
void multiply_group(const float* const* rows, int64_t count, const Matrix<W>& m, int64_t begin, int64_t end,
                    int64_t depth, float* result, int64_t result_stride) {
  if constexpr (sizeof(W) == 2)  // widening a number takes as long as two products with it
    if (count == 8 && m.in == 1) return multiply_rows<8>(rows, m, begin, end, depth, result, result_stride);
  if (count >= 4) {
    multiply_rows<4>(rows, m, begin, end, depth, result, result_stride);
    return multiply_group(rows + 4, count - 4, m, begin, end, depth, result + 4 * result_stride, result_stride);
  }
  if (count == 3) multiply_rows<3>(rows, m, begin, end, depth, result, result_stride);
  if (count == 2) multiply_rows<2>(rows, m, begin, end, depth, result, result_stride);
  if (count == 1) multiply_rows<1>(rows, m, begin, end, depth, result, result_stride);
}

}  // namespace s2o
