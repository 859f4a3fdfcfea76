// Routed experts that have few tokens each, on CPU: kernels/reference_moe.py says what is computed, this file how.
//
// Choices are sorted by expert. First and second products are shared among threads in pieces, an expert's range of
// columns each, and every expert's matrices are read once, where they lie. Hidden rows, outputs of experts and sums are
// float32. A token's outputs are summed in the order of its choices.

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu_moe_hidden.h"
#include "cpu_moe_products.h"
#include "cpu_moe_rows.h"
#include "cpu_threads.h"

// Filled by kernels/moe_cpu_native.py, which mirrors these field by field. Strides count elements.
struct Weights {
  const void* data;           // of the first expert, or null and
  const void* const* table;   // one address per expert; those of experts that no token chose are not read
  int64_t expert, out, in;    // one of `out` and `in` is 1; of a bias `in` is 0
};

struct Problem {
  const float* x;              // (T, l), or with the weights on inputs (T * K, l), already weighted
  const int64_t* ids;          // (T, K)
  const float* p;              // (T, K)
  Weights w1, w2, w3, b1, b2;  // w3 with gate "separate" alone; biases may be absent, with neither data nor table
  float *hidden, *results;     // (T * K, I) and (T * K, l), made here
  int64_t* order;              // (T * K + 3 * E + 2), made here: what `Chosen` finds
  float* output;               // (T, l)
  int64_t tokens, choices, experts, width, inner;
  int64_t bytes, half;         // of a number of the weights: 4, float32; 2, bfloat16, or with `half` float16
  int64_t scored;              // where weights of choices go: 0 inputs, 1 hidden rows, 2 outputs
  int64_t threads;
  double few;                  // the most rows an expert may have, in the mean over rows
  s2o::Formula formula;
};

namespace {

using namespace s2o;

constexpr int64_t kPiece = 256;      // columns of a product that one thread makes at a time
constexpr int64_t kLeast = 64;       // columns worth a task of their own
constexpr int64_t kWorth = 1 << 17;  // bytes of weights from which more than one thread is worth waking

// order = the choices by expert and, of an expert, as they come, those of no expert last; counts (experts + 1) = how
// many each has.
void sort_choices(const int64_t* ids, int64_t choices, int64_t experts, int64_t* order, int64_t* counts) {
  const auto bin = [&](int64_t i) { return ids[i] >= 0 && ids[i] < experts ? ids[i] : experts; };
  std::fill(counts, counts + experts + 1, 0);
  for (int64_t i = 0; i < choices; ++i) ++counts[bin(i)];
  int64_t total = 0;
  for (int64_t e = 0; e <= experts; ++e) total += std::exchange(counts[e], total);
  for (int64_t i = 0; i < choices; ++i) order[counts[bin(i)]++] = i;  // leaves where each expert's choices end
  for (int64_t e = experts; e > 0; --e) counts[e] -= counts[e - 1];
}

// The experts that were chosen, and the choices of each.
struct Chosen {
  int64_t *order, *expert, *first, hit = 0;  // choices by expert; each chosen one, and where its choices begin and end
  double rows = 0.0;                         // of an expert, in the mean over rows

  explicit Chosen(const Problem& p) : order(p.order), expert(order + p.tokens * p.choices), first(expert + p.experts) {
    int64_t* counts = first + p.experts + 1;
    sort_choices(p.ids, p.tokens * p.choices, p.experts, order, counts);
    int64_t total = 0;
    for (int64_t e = 0; e < p.experts; ++e) {
      if (!counts[e]) continue;
      expert[hit] = e, first[hit++] = total;
      total += counts[e];
      rows += static_cast<double>(counts[e]) * static_cast<double>(counts[e]);
    }
    first[hit] = total;
    if (total) rows /= static_cast<double>(total);
  }
};

template <class W>
class Experts {
 public:
  explicit Experts(const Problem& p) : p_(p), chosen_(p) {}

  // False, and nothing is done, where experts have too many rows.
  bool run() {
    if (chosen_.rows > p_.few) return false;
    const int64_t touched = chosen_.hit * p_.inner * p_.width * 2 * int64_t(sizeof(W));
    threads_ = touched < kWorth ? 1 : p_.threads;
    share(p_.inner, [&](int64_t slot, int64_t begin, int64_t end) { first(slot, begin, end); });
    share(p_.width, [&](int64_t slot, int64_t begin, int64_t end) { second(slot, begin, end); });
    on_team(p_.tokens * p_.choices * p_.width < kWorth / 4 ? 1 : threads_, p_.tokens,
            [&](int64_t token) { combine(token); });
    return true;
  }

 private:
  static bool given(const Weights& w) { return w.data || w.table; }
  static const W* at(const Weights& w, int64_t expert) {
    return w.table ? static_cast<const W*>(w.table[expert]) : static_cast<const W*>(w.data) + expert * w.expert;
  }

  // Calls work(slot, begin, end) for every chosen expert and ranges of its columns.
  template <class Work>
  void share(int64_t columns, const Work& work) {
    if (!chosen_.hit) return;
    const int64_t wanted = threads_ > 1 ? (8 * threads_ + chosen_.hit - 1) / chosen_.hit : 1;
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, columns / kLeast));
    const int64_t step = ((columns + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
    on_team(threads_, chosen_.hit * parts, [&](int64_t task) {
      const int64_t begin = task % parts * step, end = std::min(columns, begin + step);
      if (begin < end) work(task / parts, begin, end);
    });
  }

  // Calls work(choices, count, from, to) for groups of rows of an expert and pieces of its columns. Pieces are
  // narrow where they must stay in cache for the next rows.
  template <class Work>
  void blocks(int64_t slot, int64_t begin, int64_t end, const Work& work) {
    const int64_t rows = chosen_.first[slot + 1] - chosen_.first[slot];
    const int64_t step = rows > kGroup / 2 ? kPiece / 4 : kPiece;
    for (int64_t from = begin; from < end; from += step)
      for (int64_t row = 0; row < rows; row += kGroup)
        work(chosen_.order + chosen_.first[slot] + row, std::min(kGroup, rows - row), from,
             std::min(end, from + step));
  }

  void add_bias(const Weights& b, int64_t expert, int64_t begin, int64_t end, float* row) {
    if (!given(b)) return;
    const W* bias = at(b, expert);
    for (int64_t i = begin; i < end; ++i) row[i - begin] += widen(bias + i * b.out);
  }

  // Columns [begin, end) of the hidden rows of an expert.
  void first(int64_t slot, int64_t begin, int64_t end) {
    const int64_t expert = chosen_.expert[slot];
    const bool gated = p_.formula.gate != Gate::kNone, interleaved = p_.formula.gate == Gate::kInterleaved;
    const bool swapped = p_.formula.gate == Gate::kHalfSwapped, separate = p_.formula.gate == Gate::kSeparate;
    const Matrix<W> w1{at(p_.w1, expert), p_.w1.out, p_.w1.in};
    const Matrix<W> w3 = separate ? Matrix<W>{at(p_.w3, expert), p_.w3.out, p_.w3.in} : w1;
    const int64_t gate_at = swapped ? p_.inner : 0, up_at = swapped || separate ? 0 : p_.inner;
    blocks(slot, begin, end, [&](const int64_t* choices, int64_t count, int64_t from, int64_t to) {
      float gate[kGroup][2 * kPiece], up[kGroup][kPiece];
      const float* rows[kGroup] = {};
      for (int64_t r = 0; r < count; ++r)
        rows[r] = p_.x + (p_.scored == 0 ? choices[r] : choices[r] / p_.choices) * p_.width;
      if (interleaved) {
        multiply_group(rows, count, w1, 2 * from, 2 * to, p_.width, gate[0], 2 * kPiece);
      } else {
        multiply_group(rows, count, w1, gate_at + from, gate_at + to, p_.width, gate[0], 2 * kPiece);
        if (gated) multiply_group(rows, count, w3, up_at + from, up_at + to, p_.width, up[0], kPiece);
      }
      const int64_t columns = to - from;
      for (int64_t r = 0; r < count; ++r) {
        if (interleaved) {
          add_bias(p_.b1, expert, 2 * from, 2 * to, gate[r]);
          for (int64_t i = 0; i < columns; ++i) up[r][i] = gate[r][2 * i + 1], gate[r][i] = gate[r][2 * i];
        } else {
          // In the bias, unlike in the weights, halves that are separate tensors follow each other.
          add_bias(p_.b1, expert, gate_at + from, gate_at + to, gate[r]);
          if (gated) add_bias(p_.b1, expert, p_.inner - gate_at + from, p_.inner - gate_at + to, up[r]);
        }
        const float weight = p_.scored == 1 ? p_.p[choices[r]] : 1.0f;
        float* hidden = p_.hidden + choices[r] * p_.inner + from;
        with_expert(p_.formula, [&](const auto& activated) {
          for (int64_t i = 0; i < columns; i += kLanes) {
            const Vec x = load_some(gate[r] + i, columns - i);
            const Vec h = gated ? activated(x, load_some(up[r] + i, columns - i)) : activated(x);
            store_some(hidden + i, h * weight, columns - i);
          }
        });
      }
    });
  }

  // Columns [begin, end) of the outputs of an expert.
  void second(int64_t slot, int64_t begin, int64_t end) {
    const int64_t expert = chosen_.expert[slot];
    const Matrix<W> w2{at(p_.w2, expert), p_.w2.out, p_.w2.in};
    blocks(slot, begin, end, [&](const int64_t* choices, int64_t count, int64_t from, int64_t to) {
      float result[kGroup][kPiece];
      const float* rows[kGroup] = {};
      for (int64_t r = 0; r < count; ++r) rows[r] = p_.hidden + choices[r] * p_.inner;
      multiply_group(rows, count, w2, from, to, p_.inner, result[0], kPiece);
      for (int64_t r = 0; r < count; ++r) {
        add_bias(p_.b2, expert, from, to, result[r]);
        std::copy(result[r], result[r] + to - from, p_.results + choices[r] * p_.width + from);
      }
    });
  }

  void combine(int64_t token) {
    float* output = p_.output + token * p_.width;
    std::fill(output, output + p_.width, 0.0f);
    for (int64_t choice = token * p_.choices; choice < (token + 1) * p_.choices; ++choice) {
      if (p_.ids[choice] < 0 || p_.ids[choice] >= p_.experts) continue;
      const float weight = p_.scored == 2 ? p_.p[choice] : 1.0f, *result = p_.results + choice * p_.width;
      for (int64_t i = 0; i < p_.width; ++i) output[i] += weight * result[i];
    }
  }

  const Problem& p_;
  const Chosen chosen_;
  int64_t threads_ = 1;
};

}  // namespace

// 0, or 1 when experts have too many rows.
extern "C" int s2o_cpu_moe(const Problem* problem) {
  if (problem->bytes == 4) return Experts<float>(*problem).run() ? 0 : 1;
  if (problem->half) return Experts<Float16>(*problem).run() ? 0 : 1;
  return Experts<BFloat16>(*problem).run() ? 0 : 1;
}

extern "C" void s2o_cpu_moe_hidden(const HiddenRows* rows) {
  with_expert(rows->formula, [&](const auto& expert) {
    rows->bytes == 4 ? activate_rows<float>(*rows, expert) : activate_rows<BFloat16>(*rows, expert);
  });
}

extern "C" void s2o_cpu_moe_hidden_backward(const HiddenGradients* rows) {
  with_expert(rows->formula, [&](const auto& expert) {
    rows->bytes == 4 ? differentiate_rows<float>(*rows, expert) : differentiate_rows<BFloat16>(*rows, expert);
  });
}

extern "C" void s2o_cpu_moe_sum(const Sums* sums) {
  sums->bytes == 4 ? sum_choices<float>(*sums) : sum_choices<BFloat16>(*sums);
}

// As `Routing.of` of kernels/moe_routing.py; `counts` has a number more, of choices that are of no expert.
extern "C" void s2o_cpu_moe_route(const int64_t* ids, int64_t choices, int64_t experts, int64_t* order, int64_t* place,
                                  int64_t* counts) {
  sort_choices(ids, choices, experts, order, counts);
  for (int64_t i = 0; i < choices; ++i) place[order[i]] = i;
}
