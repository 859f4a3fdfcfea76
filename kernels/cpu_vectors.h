// Vectors of floats as wide as the machine's, and the products of attention on them, for the kernels of this folder.
//
// Scores lie transposed, keys x queries, and queries come in panels as wide as a few vector registers. Maxima and
// sums over keys then need no step across lanes, and both products read a key's row one number at a time, broadcast:
// a row of K or V is used where it lies, through a pointer, neither packed nor copied.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

namespace s2o {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kPanel = kLanes * kVectors;  // queries
constexpr int kRows = 6;                   // kRows x kVectors accumulators leave few registers idle
constexpr int kKeys = 64;                  // of a chunk: its rows and scores stay in L1 and L2
constexpr float kHidden = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t Bits __attribute__((vector_size(kLanes * 4), may_alias));

inline Vec splat(float x) { return x - Vec{}; }
inline Vec& vec(float* x) { return *reinterpret_cast<Vec*>(x); }
inline const Vec& vec(const float* x) { return *reinterpret_cast<const Vec*>(x); }

// 2^x for x <= 0 with a relative error under 2e-7; exactly 0 below the normal numbers, so that what is hidden
// weighs nothing. NaN stays NaN.
inline Vec exp2_of(Vec x) {
  const Vec rounder = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits hold x rounded to an integer
  const Vec sum = x + rounder;
  const Vec f = x - (sum - rounder);
  Vec y = splat(1.326472711e-3f);  // minimax for 2^f, |f| <= 1/2
  y = y * f + 9.671512681e-3f;
  y = y * f + 5.550733743e-2f;
  y = y * f + 2.402224208e-1f;
  y = y * f + 6.931469776e-1f;
  y = y * f + 1.0f;
  const Vec power = (Vec)(((Bits)sum << 23) + 0x3f800000);
  return x < splat(-126.0f) ? Vec{} : y * power;
}

inline float lane_sum(Vec x) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad parts[kLanes / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int half = kLanes / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// out[i] = sum over d of rows[i][d] * columns[d], for ROWS keys and VECS vectors of queries.
template <int ROWS, int VECS>
inline void multiply(const float* const* rows, const float* columns, int64_t column_stride, int64_t depth, float* out,
                     int64_t out_stride) {
  Vec sum[ROWS][VECS] = {};
  const float* row[ROWS];
  for (int i = 0; i < ROWS; ++i) row[i] = rows[i];
  for (int64_t d = 0; d < depth; ++d, columns += column_stride) {
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = splat(row[i][d]);
      for (int c = 0; c < VECS; ++c) sum[i][c] += x * vec(columns + c * kLanes);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int c = 0; c < VECS; ++c) vec(out + i * out_stride + c * kLanes) = sum[i][c];
}

// out[i] += sum over keys j of rows[j][first + i] * weights[j], for ROWS features and a panel of queries.
template <int ROWS>
inline void accumulate(const float* const* rows, int64_t first, const float* weights, int64_t count, float* out) {
  Vec sum[ROWS][kVectors];
  for (int i = 0; i < ROWS; ++i)
    for (int c = 0; c < kVectors; ++c) sum[i][c] = vec(out + i * kPanel + c * kLanes);
  for (int64_t j = 0; j < count; ++j, weights += kPanel) {
    const float* row = rows[j] + first;
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = splat(row[i]);
      for (int c = 0; c < kVectors; ++c) sum[i][c] += x * vec(weights + c * kLanes);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int c = 0; c < kVectors; ++c) vec(out + i * kPanel + c * kLanes) = sum[i][c];
}

// The last rows, fewer than a whole block.
template <int ROWS, int VECS>
void multiply_rest(int64_t left, const float* const* rows, const float* columns, int64_t column_stride, int64_t depth,
                   float* out, int64_t out_stride) {
  if constexpr (ROWS > 0) {
    if (left == ROWS) return multiply<ROWS, VECS>(rows, columns, column_stride, depth, out, out_stride);
    multiply_rest<ROWS - 1, VECS>(left, rows, columns, column_stride, depth, out, out_stride);
  }
}

template <int ROWS>
void accumulate_rest(int64_t left, const float* const* rows, int64_t first, const float* weights, int64_t count,
                     float* out) {
  if constexpr (ROWS > 0) {
    if (left == ROWS) return accumulate<ROWS>(rows, first, weights, count, out);
    accumulate_rest<ROWS - 1>(left, rows, first, weights, count, out);
  }
}

// Rows of memory that will be read next, brought into cache a few lines at a time: each call comes between blocks of a
// product. All at once they would fill the buffers of outstanding loads, and the products would wait for those.
class Ahead {
 public:
  // Two arrays of `count` rows each, and how many calls there will be.
  Ahead(const float* const* k, int64_t width, const float* const* v, int64_t value_width, int64_t count, int64_t calls)
      : rows_{k, v}, widths_{width, value_width}, count_(count) {
    const int64_t lines = count * ((width + kLine - 1) / kLine + (value_width + kLine - 1) / kLine);
    pace_ = calls ? (lines + calls - 1) / calls : 0;
  }
  Ahead() = default;

  void operator()() {
    for (int64_t i = 0; i < pace_ && which_ < 2; ++i) {
      if (row_ < count_) __builtin_prefetch(rows_[which_][row_] + at_);
      if ((at_ += kLine) < widths_[which_]) continue;
      at_ = 0;
      if (++row_ >= count_) row_ = 0, ++which_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  const float* const* rows_[2] = {};
  int64_t widths_[2] = {}, count_ = 0, pace_ = 0;
  int64_t which_ = 0, row_ = 0, at_ = 0;
};

// out[i][c] = the product of row i and column c, for VECS vectors of columns; `between` is called after each block of
// rows.
template <int VECS, class Between>
void multiply_all(const float* const* rows, int64_t count, const float* columns, int64_t column_stride, int64_t depth,
                  float* out, int64_t out_stride, Between&& between) {
  constexpr int ROWS = VECS >= 4 ? kRows : 8;
  int64_t i = 0;
  for (; i + ROWS <= count; i += ROWS, between())
    multiply<ROWS, VECS>(rows + i, columns, column_stride, depth, out + i * out_stride, out_stride);
  multiply_rest<ROWS - 1, VECS>(count - i, rows + i, columns, column_stride, depth, out + i * out_stride, out_stride);
}

template <int VECS>
void multiply_all(const float* const* rows, int64_t count, const float* columns, int64_t column_stride, int64_t depth,
                  float* out, int64_t out_stride) {
  multiply_all<VECS>(rows, count, columns, column_stride, depth, out, out_stride, [] {});
}

// output (width, kPanel) += for each feature, the sum over `count` keys of value times weight; `between` as above.
template <class Between>
void accumulate_all(const float* const* values, int64_t count, const float* weights, int64_t width, float* output,
                    Between&& between) {
  int64_t d = 0;
  for (; d + kRows <= width; d += kRows, between())
    accumulate<kRows>(values, d, weights, count, output + d * kPanel);
  accumulate_rest<kRows - 1>(width - d, values, d, weights, count, output + d * kPanel);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define S2O_SHUFFLES
#endif
#endif

#ifdef S2O_SHUFFLES
// Swaps the blocks of STEP lanes off the diagonal in pairs of rows that are STEP apart, then does so with half of it.
template <int STEP, size_t... LANE>
inline void exchange(Vec* rows, std::index_sequence<LANE...> lanes) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & STEP) continue;
    const Vec low = rows[i], high = rows[i + STEP];
    rows[i] = __builtin_shufflevector(low, high, (LANE & STEP ? kLanes + LANE - STEP : LANE)...);
    rows[i + STEP] = __builtin_shufflevector(low, high, (LANE & STEP ? kLanes + LANE : LANE + STEP)...);
  }
  if constexpr (STEP > 1) exchange<STEP / 2>(rows, lanes);
}
#endif

// Copies rows (count, width), `stride` apart, as columns (width, length), zeros behind the last of them.
inline void transpose(const float* rows, int64_t stride, int64_t count, int64_t width, float* columns,
                      int64_t length) {
  for (int64_t j = 0; j < length; j += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec block[kLanes] = {};
      const int64_t most = std::min<int64_t>(kLanes, count - j), wide = std::min<int64_t>(kLanes, width - d);
      for (int64_t i = 0; i < most; ++i) {
        const float* row = rows + (j + i) * stride + d;
        if (wide == kLanes)
          std::memcpy(&block[i], row, sizeof(Vec));  // one load
        else
          std::memcpy(&block[i], row, sizeof(float) * wide);
      }
#ifdef S2O_SHUFFLES
      exchange<kLanes / 2>(block, std::make_index_sequence<kLanes>());
      for (int64_t i = 0; i < wide; ++i) vec(columns + (d + i) * length + j) = block[i];
#else
      for (int64_t i = 0; i < wide; ++i)
        for (int64_t lane = 0; lane < kLanes; ++lane) columns[(d + i) * length + j + lane] = block[lane][i];
#endif
    }
}

inline bool is_finite(const float* row, int64_t width) {
  float probe = 0.0f;  // infinity times 0 is NaN
  for (int64_t d = 0; d < width; ++d) probe += row[d] * 0.0f;
  return probe == 0.0f;
}

// Memory of one thread, aligned for vectors; grows and is never cleared.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { release(); }
  T* of(int64_t count) {
    if (count > size_) {
      release();
      data_ = static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t(64)));
      size_ = count;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
    size_ = 0;
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
};
using Buffer = Array<float>;

}  // namespace s2o
