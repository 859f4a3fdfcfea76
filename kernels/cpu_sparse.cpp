// S2O sparse attention on CPU: kernels/reference_sparse.py says what it computes, this file how.
//
// One thread computes a tile of queries at a time, for all query heads of a key/value head: a chunk of rows of K and V
// that has come into cache serves every head that has not stopped. cpu_vectors.h tells how scores lie.
//
// Scores, peaks and log-sums are in units of log 2: the factor log2(e) is folded into the queries.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu_documents.h"
#include "cpu_forecast.h"
#include "cpu_groups.h"
#include "cpu_queries.h"
#include "cpu_rank.h"
#include "cpu_softmax.h"
#include "cpu_threads.h"
#include "cpu_vectors.h"

// Filled by kernels/cpu_sparse.py, which mirrors it field by field. Strides count elements; the last dimension of
// q, k and v has stride 1.
struct Problem {
  const float *q, *k, *v;              // (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)
  float *tail_k, *tail_spread;         // (B, Hkv, P, D), P = clusters in each whole block: means, and variances of
                                       // keys over 2 log2(e); made here, like the next four
  float* tail_v;                       // (B, Hkv, P, Dv)
  float* columns;                      // (B, Hkv, Sk in chunks of kKeys, D, kKeys): k for the ranking, made here too;
                                       // null where nothing is ranked
  int32_t *size, *member;              // (B, Hkv, P), (B, Hkv, Sk in whole chunks of kKeys): how many keys that may
                                       // be seen a group has, and the group of each key of whole blocks
  const uint8_t* keys;                 // (B, Sk), or null
  s2o::DocumentTables documents;
  const float* budgets;                // (Hq,)
  float *output, *lse, *tail;          // (B, Sq, Hq, Dv), (B, Hq, Sq), (B, Hq, tiles)
  int64_t *bundles, *pairs, *visible;  // (B, Hq, tiles)
  int64_t q_strides[3], k_strides[3], v_strides[3];
  int64_t batch, heads, kv_heads, queries, length, width, value_width;
  int64_t causal, window;  // a window of 0 is none
  int64_t tile, sink, bundle, horizon, sub_means, run, block, rounds;
  int64_t clusters;  // without them the tail is dropped
  int64_t threads;
  double scale, max_density, limit;  // the limit in units of log 2
  double full;                       // the share of a prefix that a tile may be expected to read without reading all
};

namespace {

using namespace s2o;

constexpr double kLog2E = 1.4426950408889634;

class Worker {
 public:
  explicit Worker(const Problem& p)
      : p_(p), group_(p.heads / p.kv_heads), factor_(static_cast<float>(p.scale * kLog2E)) {}
  void run(int64_t b, int64_t kv_head, int64_t t, int64_t start, int64_t end, int64_t tiles);

 private:
  void read_densely(int64_t from, int64_t to);
  void flush(Chunk& chunk);
  void rank();
  void average(int64_t parts, int64_t rounds, float* means);
  bool expects_all(const Prefix& prefix, int64_t total);
  void list_keys();
  void fill(Chunk& chunk, int64_t from, int64_t end);
  void read_bundles();
  bool may_stop(int64_t head, float ratio, float* estimate);
  void add_tails();
  void flush_tail(Chunk& chunk, const std::vector<int64_t>& heads, size_t first, size_t last);
  void write(int64_t t, int64_t tiles);

  const float* k_row(int64_t j) const { return k_ + j * p_.k_strides[2]; }
  const float* v_row(int64_t j) const { return v_ + j * p_.v_strides[2]; }
  bool allowed(int64_t j) const { return !keys_ || keys_[j]; }
  const float* q_row(int64_t head, int64_t i) const {
    return p_.q + b_ * p_.q_strides[0] + (kv_head_ * group_ + head) * p_.q_strides[1] +
           (start_ - (p_.length - p_.queries) + i) * p_.q_strides[2];
  }

  const Problem& p_;
  const int64_t group_;
  const float factor_;

  // The tile: queries at absolute positions [start, end), its prefix [low, high), what is read densely and how
  // many of its pairs are visible.
  int64_t b_, kv_head_, start_, end_, rows_, low_, high_, dense_pairs_;
  const float *k_, *v_;
  const uint8_t* keys_;
  Documents documents_;

  Softmax softmax_;
  Averager averager_;
  Ranker ranker_;
  Forecaster forecaster_;
  std::vector<Voter> voters_;
  Buffer queries_, means_;       // of the voters and of their parts
  bool everything_ = false;      // all of the prefix is read, whatever the rule says
  std::vector<int32_t> runs_;    // of the prefix, in the order they are read
  std::vector<int32_t> order_;   // their keys that may be seen, counted from low_
  std::vector<int64_t> edges_;   // how many of these come before each bundle, and in all
  std::vector<int64_t> counts_, read_, active_;
  std::vector<float> estimate_;
};

void Worker::run(int64_t b, int64_t kv_head, int64_t t, int64_t start, int64_t end, int64_t tiles) {
  b_ = b, kv_head_ = kv_head, start_ = start, end_ = end, rows_ = end - start;
  k_ = p_.k + b * p_.k_strides[0] + kv_head * p_.k_strides[1];
  v_ = p_.v + b * p_.v_strides[0] + kv_head * p_.v_strides[1];
  keys_ = p_.keys ? p_.keys + b * p_.length : nullptr;
  const int64_t query = start - (p_.length - p_.queries);
  documents_ = p_.documents.of(b * tiles + t, b * p_.queries + query, rows_, b * p_.length);
  const int64_t unit = p_.block;
  low_ = std::max(p_.sink, documents_.low);
  if (p_.window && end > p_.window) low_ = std::max(low_, (end - p_.window + unit - 1) / unit * unit);
  high_ = std::max(low_, (p_.causal ? start / p_.tile * p_.tile : p_.length) / unit * unit);
  dense_pairs_ = 0;
  read_.assign(group_, 0);
  estimate_.assign(group_, 0.0f);

  softmax_.start({group_, rows_, p_.width, p_.value_width, start, p_.causal != 0, p_.window,
                  documents_.differ() ? documents_.rows : nullptr});
  for (int64_t head = 0; head < group_; ++head)
    for (int64_t i = 0; i < rows_; ++i) softmax_.set_query(head, i, q_row(head, i), factor_);
  const int64_t first = std::max(documents_.first, p_.window ? std::max<int64_t>(start - p_.window + 1, 0) : 0);
  const int64_t last = p_.causal ? end : p_.length;
  read_densely(first, std::min(low_, last));
  read_densely(std::max(first, high_), last);
  for (int64_t head = 0; head < group_; ++head) softmax_.settle(head);
  rank();
  if (!order_.empty()) {
    read_bundles();
    if (p_.clusters) add_tails();
  }
  write(t, tiles);
}

// Chunks of the keys [from, to) that some row may see.
void Worker::read_densely(int64_t from, int64_t to) {
  Chunk chunk;
  for (int64_t j = from; j < to; ++j) {
    if (!allowed(j)) continue;
    const int64_t begin = p_.causal ? std::max<int64_t>(j - start_, 0) : 0;
    const int64_t seen = documents_.share(begin, p_.window ? std::min(rows_, j + p_.window - start_) : rows_, j);
    if (!seen) continue;
    dense_pairs_ += seen;
    chunk.bounded |= seen < rows_;
    if (documents_.rows) chunk.document[chunk.count] = documents_.keys[j];
    chunk.k[chunk.count] = k_row(j), chunk.v[chunk.count] = v_row(j), chunk.position[chunk.count] = j;
    if (++chunk.count == kKeys) flush(chunk);
  }
  flush(chunk);
}

void Worker::flush(Chunk& chunk) {
  if (!chunk.count) return;
  for (int64_t head = 0; head < group_; ++head) softmax_.add(head, chunk);
  chunk.count = 0, chunk.bounded = false;
}

// Fills order_ with the keys of the prefix that may be seen: by falling score of their runs, or, where all of them are
// read whatever the order, by position. That is so for budgets of 0, for a single bundle, and where the rule would read
// nearly all.
void Worker::rank() {
  const int64_t run = p_.run;
  runs_.clear();
  int64_t total = 0;
  for (int64_t r = 0; r < (high_ - low_) / run; ++r) {
    int64_t count = 0;
    for (int64_t j = low_ + r * run; j < low_ + (r + 1) * run; ++j) count += allowed(j);
    if (count) runs_.push_back(static_cast<int32_t>(r));
    total += count;
  }
  const float* budgets = p_.budgets + kv_head_ * group_;
  everything_ = p_.max_density >= 1.0 && std::all_of(budgets, budgets + group_, [](float x) { return x == 0.0f; });
  if (!everything_ && static_cast<int64_t>(runs_.size()) * run > p_.bundle) {
    const int64_t head = b_ * p_.kv_heads + kv_head_, chunks = (p_.length + kKeys - 1) / kKeys;
    const Prefix prefix{p_.columns + head * chunks * kKeys * p_.width, low_, high_, p_.width, keys_};
    everything_ = p_.full < 1.0 && p_.max_density >= 1.0 && expects_all(prefix, total);
    if (!everything_) {
      const int64_t parts = std::min(p_.sub_means, rows_), first = head * (p_.length / p_.block * p_.clusters);
      average(parts, p_.rounds, ranker_.start(group_ * parts, p_.width));
      const Groups groups{p_.tail_k + first * p_.width, p_.tail_spread + first * p_.width, p_.size + first,
                          p_.member + head * chunks * kKeys, p_.clusters, p_.block, static_cast<float>(p_.limit)};
      ranker_.sort(prefix, groups, run, runs_);
    }
  }
  list_keys();
}

// The mean queries (heads, parts, D) of the tile, with the factor of scores in them.
void Worker::average(int64_t parts, int64_t rounds, float* means) {
  for (int64_t head = 0; head < group_; ++head)
    averager_.average({q_row(head, 0), p_.q_strides[2], rows_, p_.width}, factor_, rounds, parts,
                      means + head * parts * p_.width);
}

// Whether the tile can be expected to read so much of its prefix, `total` keys that may be seen, that it had better
// read all of it.
bool Worker::expects_all(const Prefix& prefix, int64_t total) {
  const int64_t parts = std::min(kVoters, rows_);
  average(parts, 0, means_.of(group_ * parts * p_.width));
  voters_.clear();
  float* query = queries_.of(group_ * parts * p_.width);
  for (int64_t head = 0; head < group_; ++head)
    for (int64_t part = 0, i = -1; part < parts; ++part, query += p_.width) {
      i += rows_ / parts + (part < rows_ % parts);
      for (int64_t d = 0; d < p_.width; ++d) query[d] = q_row(head, i)[d] * factor_;
      voters_.push_back({query, softmax_.peak(head, i), softmax_.mass(head, i)});
    }
  const Outlook outlook{p_.block, p_.bundle, p_.horizon, group_, total, p_.budgets + kv_head_ * group_};
  return forecaster_.expect(prefix, means_.of(0), voters_, outlook) > p_.full;
}

// The keys of runs_ that may be seen, and where bundles begin: a hidden key has a place in its bundle and is not read.
void Worker::list_keys() {
  const auto listed = static_cast<int64_t>(runs_.size());
  order_.resize(listed * p_.run);
  edges_.clear();
  int64_t count = 0;
  for (int64_t i = 0; i < listed; ++i) {
    if (i * p_.run % p_.bundle == 0) edges_.push_back(count);
    const int64_t first = runs_[i] * p_.run;
    for (int64_t key = first; key < first + p_.run; ++key)
      if (allowed(low_ + key)) order_[count++] = static_cast<int32_t>(key);
  }
  edges_.push_back(count);
  order_.resize(count);
}

// The keys of the order from its `from`-th on, none from the `end`-th on.
void Worker::fill(Chunk& chunk, int64_t from, int64_t end) {
  chunk.count = std::min<int64_t>(end - from, kKeys);
  for (int64_t j = 0; j < chunk.count; ++j) {
    const int64_t key = low_ + order_[from + j];
    chunk.k[j] = k_row(key), chunk.v[j] = v_row(key);
  }
}

// Bundle after bundle, until each head's rule stops it.
void Worker::read_bundles() {
  const int64_t listed = static_cast<int64_t>(runs_.size()) * p_.run;
  const double cap = std::ceil(p_.max_density * static_cast<double>(listed));
  const int64_t most = static_cast<int64_t>(std::ceil(cap / static_cast<double>(p_.bundle)));
  active_.clear();
  for (int64_t head = 0; head < group_; ++head) active_.push_back(head);
  Chunk chunks[2], *chunk = &chunks[0], *next = &chunks[1];
  fill(*chunk, 0, edges_[1]);
  for (int64_t bundle = 0; bundle < most && !active_.empty(); ++bundle) {
    const int64_t end = edges_[bundle + 1];
    const int64_t beyond = edges_[std::min<size_t>(bundle + 2, edges_.size() - 1)];
    for (int64_t from = edges_[bundle]; from < end; std::swap(chunk, next)) {
      from += chunk->count;
      fill(*next, from, from < end ? end : beyond);
      const int64_t calls = static_cast<int64_t>(active_.size()) * softmax_.pauses(chunk->count);
      Ahead ahead(next->k, p_.width, next->v, p_.value_width, next->count, calls);
      for (const int64_t head : active_) softmax_.add(head, *chunk, ahead);
    }
    const int64_t done = std::min(listed, (bundle + 1) * p_.bundle);
    const auto size = static_cast<double>(done - bundle * p_.bundle);
    const auto ratio = static_cast<float>(static_cast<double>(listed - done) / size);
    active_.erase(std::remove_if(active_.begin(), active_.end(),
                                 [&](int64_t head) {
                                   const bool stop = may_stop(head, ratio, &estimate_[head]) && !everything_;
                                   softmax_.settle(head);
                                   read_[head] = bundle + 1;
                                   return stop;
                                 }),
                  active_.end());
  }
}

// Whether the estimated tail of every row is within the budget; its mean over the rows goes to `estimate`.
bool Worker::may_stop(int64_t head, float ratio, float* estimate) {
  const float budget = p_.budgets[kv_head_ * group_ + head];
  bool fine = budget > 0.0f;
  const float assumed = ratio > 0.0f ? std::max(ratio, static_cast<float>(p_.horizon)) : 0.0f;
  double sum = 0.0;
  for (int64_t i = 0; i < rows_; ++i) {
    const float added = softmax_.added(head, i), mass = softmax_.mass(head, i) + added;
    fine &= share(assumed * added, mass) <= budget;  // not so for NaN
    sum += share(ratio * added, mass);
  }
  *estimate = static_cast<float>(sum / static_cast<double>(rows_));
  return fine;
}

// The tail of each head: heads that stopped early first, so that what is left of the groups only shrinks.
void Worker::add_tails() {
  const auto bundles = static_cast<int64_t>(edges_.size()) - 1;
  std::vector<int64_t> heads;
  for (int64_t head = 0; head < group_; ++head)
    if (read_[head] < bundles) heads.push_back(head);
  if (heads.empty()) return;
  std::stable_sort(heads.begin(), heads.end(), [&](int64_t x, int64_t y) { return read_[x] < read_[y]; });
  const int64_t head_at = b_ * p_.kv_heads + kv_head_, chunks = (p_.length + kKeys - 1) / kKeys;
  const int64_t begin = low_ / p_.block * p_.clusters, end = high_ / p_.block * p_.clusters;
  const int64_t first_row = head_at * (p_.length / p_.block * p_.clusters) + begin;
  const int32_t* member = p_.member + head_at * chunks * kKeys + low_;
  counts_.assign(p_.size + first_row, p_.size + first_row + (end - begin));
  int64_t done = 0;
  for (size_t first = 0, last = 0; first < heads.size(); first = last) {
    const int64_t read = read_[heads[first]];
    while (last < heads.size() && read_[heads[last]] == read) ++last;
    for (; done < edges_[read]; ++done) --counts_[member[order_[done]] - begin];
    Chunk chunk;
    chunk.limit = static_cast<float>(p_.limit);
    for (int64_t g = 0; g < end - begin; ++g) {
      if (!counts_[g]) continue;
      const int64_t row = first_row + g;
      chunk.stand_in(p_.tail_k + row * p_.width, p_.tail_spread + row * p_.width, p_.tail_v + row * p_.value_width,
                     counts_[g], p_.size[row]);
      if (chunk.count == kKeys) flush_tail(chunk, heads, first, last);
    }
    flush_tail(chunk, heads, first, last);
    for (size_t i = first; i < last; ++i) softmax_.settle(heads[i]);
  }
}

void Worker::flush_tail(Chunk& chunk, const std::vector<int64_t>& heads, size_t first, size_t last) {
  if (!chunk.count) return;
  for (size_t i = first; i < last; ++i) softmax_.add(heads[i], chunk);
  chunk.count = 0;
}

void Worker::write(int64_t t, int64_t tiles) {
  const int64_t first = start_ - (p_.length - p_.queries);
  for (int64_t head = 0; head < group_; ++head) {
    const int64_t h = kv_head_ * group_ + head, at = (b_ * p_.heads + h) * tiles + t;
    for (int64_t i = 0; i < rows_; ++i)
      softmax_.write(head, i, p_.output + ((b_ * p_.queries + first + i) * p_.heads + h) * p_.value_width,
                     p_.lse + (b_ * p_.heads + h) * p_.queries + first + i);
    p_.bundles[at] = read_[head];
    p_.tail[at] = estimate_[head];
    p_.pairs[at] = dense_pairs_ + edges_[read_[head]] * rows_;
    p_.visible[at] = dense_pairs_ + edges_.back() * rows_;
  }
}

// The groups of all keys of whole blocks; false when memory ran out.
bool make_groups(const Problem& p) {
  const int64_t whole = p.clusters ? p.length / p.block : 0, keys = (p.length + kKeys - 1) / kKeys * kKeys;
  return on_threads(p.threads, p.batch * p.kv_heads * whole, [&]() {
    // Queries carry the scale and log2(e), which the second-order term must hold once.
    const auto factor = static_cast<float>(0.5 / kLog2E);
    return [&p, whole, keys, grouper = Grouper(p.block, p.width, p.value_width, p.clusters, p.rounds, factor)](
               int64_t task) mutable {
      const int64_t head = task / whole, block = task % whole, b = head / p.kv_heads, h = head % p.kv_heads;
      const int64_t from = block * p.block, first = block * p.clusters, at = task * p.clusters;
      grouper.group({p.k + b * p.k_strides[0] + h * p.k_strides[1] + from * p.k_strides[2],
                     p.v + b * p.v_strides[0] + h * p.v_strides[1] + from * p.v_strides[2], p.k_strides[2],
                     p.v_strides[2], p.keys ? p.keys + b * p.length + from : nullptr, static_cast<int32_t>(first),
                     p.member + head * keys + from, p.size + at, p.tail_k + at * p.width, p.tail_spread + at * p.width,
                     p.tail_v + at * p.value_width});
    };
  });
}

// The keys as columns; false when memory ran out.
bool make_columns(const Problem& p) {
  const int64_t chunks = p.columns ? (p.length + kKeys - 1) / kKeys : 0;
  return on_threads(p.threads, p.batch * p.kv_heads * chunks, [&]() {
    return [&](int64_t task) {
      const int64_t head = task / chunks, from = task % chunks * kKeys;
      const float* k = p.k + head / p.kv_heads * p.k_strides[0] + head % p.kv_heads * p.k_strides[1];
      transpose(k + from * p.k_strides[2], p.k_strides[2], std::min<int64_t>(kKeys, p.length - from), p.width,
                p.columns + task * kKeys * p.width, kKeys);
    };
  });
}

// Attention; false when memory ran out. Head after head, so that its keys stay in cache, tiles with the longest prefix
// first, so that short ones are left for the end. The result of a tile does not depend on who computes it.
bool attend(const Problem& p) {
  const int64_t before = p.length - p.queries, first = before / p.tile;
  const int64_t tiles = (p.length + p.tile - 1) / p.tile - first, heads = p.batch * p.kv_heads;
  return on_threads(p.threads, heads * tiles, [&]() {
    return [&, worker = Worker(p)](int64_t task) mutable {
      const int64_t head = task / tiles, t = tiles - 1 - task % tiles;
      const int64_t start = std::max(before, (first + t) * p.tile);
      const int64_t end = std::min(p.length, (first + t + 1) * p.tile);
      worker.run(head / p.kv_heads, head % p.kv_heads, t, start, end, tiles);
    };
  });
}

}  // namespace

// 0, or 1 when memory ran out.
extern "C" int s2o_cpu_sparse(const Problem* problem) {
  return make_columns(*problem) && make_groups(*problem) && attend(*problem) ? 0 : 1;
}
