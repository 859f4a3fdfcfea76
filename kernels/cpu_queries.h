// The mean queries that rank for a tile: kernels/reference_sparse.py, `representatives`, which says what and why.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_vectors.h"

namespace s2o {

// The queries of a head: `size` rows of `width` numbers, `stride` apart.
struct Queries {
  const float* rows;
  int64_t stride, size, width;
};

class Averager {
 public:
  // Sets means (parts, D), times `factor`: of equal parts of the queries, the first of which have one row more, and then,
  // `rounds` times, of the queries nearest to each, by k-means. A mean that is nearest to none stays.
  void average(const Queries& q, float factor, int64_t rounds, int64_t parts, float* means) {
    const int64_t length = (q.size + kPanel - 1) / kPanel * kPanel;
    int32_t* member = member_.of(length);
    for (int64_t part = 0, i = 0; part < parts; ++part)
      for (const int64_t stop = i + q.size / parts + (part < q.size % parts); i < stop; ++i)
        member[i] = static_cast<int32_t>(part);
    move(q, factor, parts, means);
    if (!rounds || parts == 1) return;
    transpose(q.rows, q.stride, q.size, q.width, columns_.of(q.width * length), length);
    while (rounds--) {
      find_nearest(q.width, length, factor, parts, means);
      move(q, factor, parts, means);
    }
  }

 private:
  // The first of the nearest means of each query.
  void find_nearest(int64_t width, int64_t length, float factor, int64_t parts, const float* means) {
    float *products = products_.of(kRows * length), *least = least_.of(length);
    const float* some[kRows];
    for (int64_t from = 0; from < parts; from += kRows) {
      const int64_t count = std::min<int64_t>(kRows, parts - from);
      for (int64_t c = 0; c < count; ++c) some[c] = means + (from + c) * width;
      for (int64_t i = 0; i < length; i += kPanel)
        multiply_all<kVectors>(some, count, columns_.of(0) + i, length, width, products + i, length);
      for (int64_t c = 0; c < count; ++c) {
        float square = 0.0f;
        for (int64_t d = 0; d < width; ++d) square += some[c][d] * some[c][d];
        int32_t* member = member_.of(0);
        for (int64_t i = 0; i < length; ++i) {
          const float distance = square - 2.0f * factor * products[c * length + i];
          const bool nearer = from + c == 0 || distance < least[i];
          member[i] = nearer ? static_cast<int32_t>(from + c) : member[i];
          least[i] = nearer ? distance : least[i];
        }
      }
    }
  }

  // Sets each mean to that of its members, if it has any.
  void move(const Queries& q, float factor, int64_t parts, float* means) {
    float* sums = sums_.of(parts * q.width);
    int32_t* sizes = sizes_.of(parts);
    std::fill_n(sums, parts * q.width, 0.0f);
    std::fill_n(sizes, parts, 0);
    for (int64_t i = 0; i < q.size; ++i) {
      const int32_t part = member_.of(0)[i];
      float* to = sums + part * q.width;
      for (int64_t d = 0; d < q.width; ++d) to[d] += q.rows[i * q.stride + d];
      ++sizes[part];
    }
    for (int64_t part = 0; part < parts; ++part) {
      if (!sizes[part]) continue;
      const float each = factor / static_cast<float>(sizes[part]);
      for (int64_t d = 0; d < q.width; ++d) means[part * q.width + d] = sums[part * q.width + d] * each;
    }
  }

  Buffer columns_, products_;         // (D, length) of the queries, (kRows, length)
  Buffer sums_, least_;               // (parts, D), (length,)
  Array<int32_t> member_, sizes_;     // (length,), (parts,)
};

}  // namespace s2o
