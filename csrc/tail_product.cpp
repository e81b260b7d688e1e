#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "linear.h"
#include "memory.h"
#include "panel.h"
#include "product.h"
#include "store.h"

namespace lora_kernels {

namespace {

// The tails' share of tiles. The panels of a segment are packed when its rows are first met at a
// panel of columns: once a thread where all blocks of a panel come one after the other, else once a
// block.
template <typename C>
class TailTiles {
 public:
  explicit TailTiles(const TailProduct<C>& product) : p_(product) {}

  // tile [M, kPanel] = the tails of rows [first, first + M), columns [n, n + cols); zero without.
  void write(int64_t first, int64_t M, int64_t n, int64_t cols, float* tile) {
    int64_t done = 0;
    for (int64_t i = 0; i < p_.count; ++i) {
      const int64_t begin = std::max<int64_t>(0, p_.segments[i].first - first);
      const int64_t end = std::min(M, p_.segments[i].first + p_.segments[i].rows - first);
      if (begin >= end) continue;
      std::fill(tile + done * kPanel, tile + begin * kPanel, 0.0f);
      write_segment(i, first + begin, end - begin, n, cols, tile + begin * kPanel);
      done = end;
    }
    std::fill(tile + done * kPanel, tile + M * kPanel, 0.0f);
  }

 private:
  // Columns of the product that lie in one of its panels and in a slice.
  struct Columns {
    int64_t begin, end;
    ConstMatrix b;  // up to the last of them
    int64_t first;  // of them in b
  };

  Columns columns_of(const Tail<C>& tail, int64_t n) const {
    const int64_t begin = std::max(n, tail.column);
    const int64_t end = std::min({n + kPanel, p_.y.cols, tail.column + tail.b.cols});
    ConstMatrix b = tail.b;
    b.cols = end - tail.column;
    return {begin, end, b, begin - tail.column};
  }

  void write_segment(int64_t i, int64_t first, int64_t M, int64_t n, int64_t cols, float* tile) {
    const TailedRows<C>& segment = p_.segments[i];
    int64_t depth = 0;
    for (int64_t c = 0; c < segment.count; ++c) depth += padded<C>(segment.tails[c].s.K);
    C* panel = tail_scratch.of<C>(depth * kPanel);
    const bool fresh = segment_ != i || column_ != n;
    segment_ = i;
    column_ = n;

    bool written = false;
    for (int64_t c = 0; c < segment.count; ++c) {
      const Tail<C>& tail = segment.tails[c];
      const Rows<C>& s = tail.s;
      const DropoutMask* mask = tail.mask;
      const auto [begin, end, b, first_of_b] = columns_of(tail, n);
      if (begin >= end) continue;
      const C* from = tail.packed ? tail.packed + first_of_b * padded<C>(s.K) : panel;
      // A slice may end within the panel, and a mask is for its own product alone.
      const bool whole = begin == n && end == n + cols, apart = !whole || (mask && written);
      if (!whole && !written) std::fill(tile, tile + M * kPanel, 0.0f);
      float* sums = apart ? part_scratch.of<float>(M * kPanel) : tile;
      const int64_t width = panel_width(end - begin);
      product_by_parts(
          M, width, s.K, s.data + (first - segment.first) * s.ld, s.ld,
          [&, &b = b, &first_of_b = first_of_b](int64_t k, int64_t k_end) {
            if (fresh && !tail.packed) pack_panel(b, k, k_end, first_of_b, panel + k * width);
            return from + k * width;
          },
          sums, written && !apart);
      if (mask) {
        drop_values(sums, M, end - begin, kPanel, first, begin, *mask,
                    p_.logical ? p_.logical + first : nullptr);
      }
      for (int64_t r = 0; apart && r < M; ++r) {
        float* to = tile + r * kPanel + begin - n;
        for (int64_t j = 0; j < end - begin; ++j) to[j] += sums[r * kPanel + j];
      }
      written = true;
      if (!tail.packed) panel += padded<C>(s.K) * width;
    }
    if (!written) std::fill(tile, tile + M * kPanel, 0.0f);
  }

  const TailProduct<C>& p_;
  int64_t segment_ = -1, column_ = -1;  // whose panels tail_scratch holds
};

// Rows of a tile: its accumulators and a part's rows stay in the second-level cache.
constexpr int64_t kRowBlock = 192, kLeastRows = 24;
// Of one that several products are added to: their panels, which are made one after the other, pay
// for themselves on as many rows.
constexpr int64_t kSummedRows = 4 * kRowBlock;

// Bytes of a block's rows that stay in the second-level cache: then its panels, packed before, come
// one after the other. 2048 x 512 x 2816 in float32 takes 0.90 of the time panel by panel, 2048 x
// 1024 x 5632 in blocks of 128 rows 0.94; blocks of 96 rows that do not stay (K = 2816) take 1.10
// (Zen 1, 2026-12). Blocks below kRowBlock were not measured with AVX-512.
constexpr int64_t kStayingBytes = int64_t{512} << 10;
constexpr int64_t kLeastStaying = kStrip == kPanel ? kRowBlock : kRowBlock / 2;

// How a product is cut into tiles.
struct TilePlan {
  int64_t blocks, block;  // of rows
  int64_t first, count;   // of its tiles among those of all products
  // All panels of a block come one after the other, or all blocks of a panel: it is packed once.
  bool by_block;
};

template <typename C>
class ProductTiles {
 public:
  // `arranged` are the rows of a product that takes them in the order of a four-bit weight's
  // nibbles, or null.
  ProductTiles(const TailProduct<C>& p, const TilePlan& plan, const C* arranged)
      : p_(p), plan_(plan), arranged_(arranged), tails_(p) {}

  // Tile number t.
  void write(int64_t t) {
    const TailProduct<C>& p = p_;
    const int64_t M = p.x.M, N = p.y.cols, block = plan_.block;
    float* tile = tile_scratch.of<float>(block * kPanel);
    const int64_t P = panels(N), number = plan_.by_block ? t % P : t / plan_.blocks;
    const int64_t n = number * kPanel, cols = std::min<int64_t>(kPanel, N - n);
    const int64_t first = (plan_.by_block ? t / P : t % plan_.blocks) * block;
    const int64_t rows = std::min(block, M - first);
    if (rows <= 0) return;
    // Of several products each packs over the panel of the one before.
    const bool fresh = current_ != n || p.other_count > 0;
    current_ = n;

    tails_.write(first, rows, n, cols, tile);
    if (p.four_bit && decodes_in_registers<C>(M, *p.four_bit)) {
      product_of_few(rows, cols, arranged_, *p.four_bit, n, tile);
    } else if (p.four_bit && multiplies_along_rows<C>(M, *p.four_bit)) {
      const int64_t ld = arranged_ ? p.x.K : p.x.ld;
      const C* x = (arranged_ ? arranged_ : p.x.data) + first * ld;
      product_along_rows(rows, cols, x, ld, arranged_ != nullptr, *p.four_bit, n, tile);
    } else {
      multiply({p.x, p.w, p.packed}, p.four_bit, first, rows, n, panel_width(cols), fresh, tile);
    }
    for (int64_t i = 0; i < p.other_count; ++i) {
      multiply(p.others[i], nullptr, first, rows, n, panel_width(cols), fresh, tile);
    }

    for (int64_t i = 0; i < rows; ++i) {
      float* sums = tile + i * kPanel;
      if (p.out_scale) {
        for (int64_t j = 0; j < cols; ++j) sums[j] *= p.out_scale[n + j];
      }
      if (p.bias) {
        for (int64_t j = 0; j < cols; ++j) sums[j] += p.bias[n + j];
      }
      store_or_add(sums, cols, p.y, p.rows ? p.rows[first + i] : first + i, n, p.add);
    }
  }

 private:
  // tile += x w of these rows and of the panel at n; w in four bits where there are such.
  void multiply(const Factors<C>& f, const FourBit* four_bit, int64_t first, int64_t rows,
                int64_t n, int64_t width, bool fresh, float* tile) {
    const int64_t K = f.x.K;
    C* own = f.packed ? nullptr : panel_scratch.of<C>(padded<C>(K) * kPanel);
    const C* panel = f.packed ? f.packed + n * padded<C>(K) : own;
    const bool in_place = own && !four_bit && reads_in_place<C>(plan_.block, f.w, n);
    for (int64_t done = 0; done < rows; done += kRowBlock) {
      const C* x = f.x.data + (first + done) * f.x.ld;
      const int64_t M = std::min(kRowBlock, rows - done);
      float* sums = tile + done * kPanel;
      if (in_place) {
        product_in_place<C>(M, width, x, f.x.ld, f.w, n, sums);
        continue;
      }
      product_by_parts(
          M, width, K, x, f.x.ld,
          [&](int64_t k, int64_t k_end) {
            if (own && fresh && done == 0) {
              four_bit ? pack_panel(*four_bit, k, k_end, n, own + k * width)
                       : pack_panel(f.w, k, k_end, n, own + k * width);
            }
            return panel + k * width;
          },
          sums, true);
    }
  }

  const TailProduct<C>& p_;
  const TilePlan& plan_;
  const C* arranged_;
  TailTiles<C> tails_;
  int64_t current_ = -1;  // the column of the panel that was packed last
};

}  // namespace

template <typename C>
void tail_products(const TailProduct<C>* products, int64_t count) {
  const int64_t threads = at::get_num_threads();
  std::unique_ptr<TilePlan[]> plans(new TilePlan[count]);
  std::unique_ptr<std::unique_ptr<C, FreeAligned>[]> arranged(
      new std::unique_ptr<C, FreeAligned>[count]);
  int64_t tiles = 0, multiplications = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t M = products[i].x.M, P = panels(products[i].y.cols);
    plans[i] = {0, 0, tiles, 0, false};
    if (M == 0 || P == 0) continue;
    const int64_t row_bytes = std::max<int64_t>(products[i].x.K, 1) * sizeof(C);
    const int64_t staying = products[i].packed ? kStayingBytes / row_bytes : 0;
    const bool stays = staying >= kLeastStaying;
    const int64_t most = products[i].other_count > 0 ? kSummedRows
                         : stays                     ? std::min(staying, kRowBlock)
                                                     : kRowBlock;
    const int64_t blocks = std::max(
        ceil_div(M, most), std::min(ceil_div(M, kLeastRows), ceil_div(4 * threads, P * count)));
    plans[i] = {blocks, ceil_div(M, blocks), tiles, P * blocks, stays};
    tiles += P * blocks;
    multiplications += M * products[i].x.K * products[i].y.cols;
    const FourBit* w = products[i].four_bit;
    const bool few = w && decodes_in_registers<C>(M, *w);
    if (few || (w && takes_nibbles<C>(M, *w))) {
      const Rows<C>& x = products[i].x;
      arranged[i] = allocate<C>(M * x.K);
      (few ? arrange_rows<C> : arrange_along_rows<C>)(M, x.K, x.data, x.ld, arranged[i].get());
    }
  }
  at::parallel_for(0, tiles, grain_of(tiles, multiplications), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count && begin < end; ++i) {
      const int64_t last = std::min(end, plans[i].first + plans[i].count);
      if (last <= begin) continue;
      ProductTiles<C> product(products[i], plans[i], arranged[i].get());
      for (; begin < last; ++begin) product.write(begin - plans[i].first);
    }
    release_products();
  });
}

template <typename C>
void tail_product(const TailProduct<C>& product) {
  tail_products(&product, 1);
}

template void tail_products(const TailProduct<float>*, int64_t);
template void tail_products(const TailProduct<BFloat16>*, int64_t);
template void tail_product(const TailProduct<float>&);
template void tail_product(const TailProduct<BFloat16>&);

}  // namespace lora_kernels
