// What a tile of queries may see of documents packed into a sequence: kernels/documents.py, which makes the tables.

#pragma once

#include <algorithm>
#include <cstdint>

namespace s2o {

struct Documents {
  const int32_t *rows = nullptr, *keys = nullptr;  // of the tile's queries and of all keys; null: all are of one
  int64_t count = 0;                               // rows
  int64_t first = 0, low = 0;                      // the least keys that the tile may see at all, and that it may rank

  // Whether rows differ in their document. Where they do not, keys of others can be left out for all of them.
  bool differ() const { return rows && std::any_of(rows, rows + count, [&](int32_t x) { return x != rows[0]; }); }

  // How many of the rows [from, to) are of the document of a key.
  int64_t share(int64_t from, int64_t to, int64_t key) const {
    if (!rows) return to - from;
    int32_t sum = 0;
    for (int64_t i = from; i < to; ++i) sum += rows[i] == keys[key];
    return sum;
  }
};

struct DocumentTables {
  const int32_t *queries, *keys, *tiles;  // (B, Sq), (B, Sk), (B, tiles, 2), or all null

  // Of the tile with this number, whose queries and keys begin at these places of their tables.
  Documents of(int64_t number, int64_t query, int64_t count, int64_t key) const {
    if (!queries) return {};
    return {queries + query, keys + key, count, tiles[2 * number], tiles[2 * number + 1]};
  }
};

}  // namespace s2o
