// The one pass over gradient and state before the first collective.
//
// A row belongs to a group of lanes: 1 to 32 neighbours that read it together, so that short rows
// share a warp, or the whole block where it is long. Each lane adds up its products for four
// columns of V, the group adds up its lanes'. Of a row in several pieces the last block to arrive
// adds up the parts, in their order. A row's own unit (levels.h) is made in one more pass over its
// message, which then lies in a cache: as a fifth sum it would cost every wire registers.
#pragma once

#include "kernels/cuda/copy_dense.h"
#include "kernels/levels.h"

namespace arc_topk::cuda {

template <class Feedback, class G, class S, class T>
struct Prepare {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = 16 / sizeof(G);
  static constexpr int kColumns = 4;          // of V at a time
  static constexpr int64_t kGroupRow = 1024;  // longer rows are the whole block's
  using FourSums = Sums<T, kColumns>;
  using Squares = Sums<double, 1>;
  struct Shared {
    FourSums warps[kWarp];
    Squares squares[kWarp];
    bool last;
  };

  Bucket b;
  Feedback feedback;
  Projection v;  // no data: no sketch
  T sketch_scale;
  T wire_scale;
  Levels<T> levels;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.compressed()) {
      copy_dense<G>(block, b, s, range_of(s, p), wire_scale);
    } else {
      update(block, shared, s, p);
    }
    finish(block, shared);
  }

 private:
  // Lanes of a group: enough for a row's vectors.
  ARC_TOPK_DEVICE int width_for(int64_t cols) const {
    if (v.data == nullptr || cols > kGroupRow) return kThreads;
    int width = 1;
    while (width < kWarp && width * kVector < cols) width *= 2;
    return width;
  }

  template <class Block>
  ARC_TOPK_DEVICE void update(Block& block, Shared& shared, const Segment& s,
                              const Piece& p) const {
    typename Block::template Each<bool> finite;
    block.each([&](int t) { finite[t] = true; });
    const bool stores = b.used[p.segment] != 0;
    const LossScale<T> scale(b);
    const int width = width_for(s.cols);
    const Range all = range_of(s, p);
    // Without a sketch there is nothing to tell rows apart for.
    const int64_t rows = v.data == nullptr ? 1 : p.row_end - p.row_begin;
    const int64_t dim = v.data == nullptr ? 1 : b.sketch_dim;
    const bool part = p.col_end - p.col_begin < s.cols;
    const int groups = kThreads / width;

    for (int64_t first = 0; first < rows; first += groups) {
      const auto row_of = [&](int t) { return p.row_begin + first + t / width; };
      const auto range_of_row = [&](int t) {
        if (v.data == nullptr || part) return all;
        const int64_t row = row_of(t), start = s.offset + row * s.cols;
        return Range{start, row < p.row_end ? smaller(start + s.cols, all.end) : start};
      };
      for (int64_t k = 0; k < dim; k += kColumns) {
        typename Block::template Each<FourSums> sums;
        block.each([&](int t) {
          const int64_t start = s.offset + row_of(t) * s.cols;
          sums[t] = {};
          finite[t] &= read(range_of_row(t), start, t % width, width, k, stores, scale, sums[t]);
        });
        if (v.data == nullptr) continue;
        if (width == kThreads) {
          block_sums(block, sums, shared.warps);
        } else {
          block.group_sums(sums, width);
        }
        block.each([&](int t) {
          if (t % width == 0 && row_of(t) < p.row_end) write(block, s, row_of(t), part, k, sums[t]);
        });
      }
      if (v.data == nullptr || !levels.used) continue;
      typename Block::template Each<Squares> squares;
      block.each([&](int t) {
        squares[t].value[0] = squares_of(range_of_row(t), t % width, width, stores, scale);
      });
      if (width == kThreads) {
        block_sums(block, squares, shared.squares);
      } else {
        block.group_sums(squares, width);
      }
      block.each([&](int t) {
        if (t % width != 0 || row_of(t) >= p.row_end) return;
        if (part) {
          Scratch(b).squares[block.index()] = squares[t].value[0];
        } else {
          write_share(s, row_of(t), squares[t].value[0]);
        }
      });
    }
    if (v.data != nullptr && part) add_parts(block, shared, s, p);
    block.each([&](int t) {
      if (!finite[t]) block.mark(b.bad + p.segment, uint8_t{1});
    });
  }

  // A lane's vectors of a row: the state's update with the first columns of V, products with the
  // columns from k on. Returns whether the message was finite.
  ARC_TOPK_DEVICE bool read(Range row, int64_t start, int lane, int width, int64_t k, bool stores,
                            const LossScale<T>& scale, FourSums& sums) const {
    const Arrays<Feedback, G, S, T> arrays(b, scale);
    const bool prepared = k > 0 && stores;
    const int64_t runs = runs_of<kVector>(row.begin, row.end);
    const bool aligned = start % 4 == 0;  // V's columns are then cut into vectors as the row is
    bool finite = true;
    for (int64_t i = lane; i < runs; i += width) {
      const Run run = run_of<kVector>(row.begin, row.end, i);
      Values<T, kVector> e;
      T x[kVector];
      if (prepared && keeps_message(Feedback::kKind)) {
        arrays.a.load(run, x);  // as it was stored for the first columns
      } else {
        arrays.load(run, e);
        finite &= form(feedback, arrays.a, e, x);
        if (keeps_message(Feedback::kKind) && stores) arrays.a.store(run, x);
      }
      if (v.data == nullptr) continue;
      if (aligned && run.is_vector<kVector>()) {
        add_products(x, run.index - start, k, sums);
        continue;
      }
      ARC_TOPK_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (k + c < b.sketch_dim) sums.value[c] = sums.value[c] + product(x, run, start, k + c);
      }
    }
    return finite;
  }

  // A lane's part of a row's sum of squares, from the message as read() has formed it.
  ARC_TOPK_DEVICE double squares_of(Range row, int lane, int width, bool stores,
                                    const LossScale<T>& scale) const {
    const Arrays<Feedback, G, S, T> arrays(b, scale);
    const int64_t runs = runs_of<kVector>(row.begin, row.end);
    double sum = 0;
    for (int64_t i = lane; i < runs; i += width) {
      const Run run = run_of<kVector>(row.begin, row.end, i);
      Values<T, kVector> e;
      T x[kVector];
      if (stores && keeps_message(Feedback::kKind)) {
        arrays.a.load(run, x);
      } else {
        arrays.load(run, e);
        form(feedback, arrays.a, e, x);
      }
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const auto wide = static_cast<double>(x[j]);
        if (run.has(j)) sum += wide * wide;
      }
    }
    return sum;
  }

  ARC_TOPK_DEVICE void write_share(const Segment& s, int64_t row, double squares) const {
    const int64_t count = smaller(s.cols, s.numel - row * s.cols);
    (static_cast<T*>(b.first) + s.units(b.sketch_dim))[row] = levels.own_share(squares, count);
  }

  // Of a whole vector: four reads with no branch between them. Columns behind the last are read as
  // the last, and not written.
  ARC_TOPK_DEVICE void add_products(const T (&x)[kVector], int64_t at, int64_t k,
                                    FourSums& sums) const {
    alignas(16) float y[kColumns][kVector];
    ARC_TOPK_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      copy_aligned<kVector * sizeof(float)>(
          y[c], v.data + smaller(k + c, b.sketch_dim - 1) * v.stride + at);
    }
    ARC_TOPK_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      sums.value[c] = sums.value[c] + dot(x, y[c]);
    }
  }

  ARC_TOPK_DEVICE T product(const T (&x)[kVector], Run run, int64_t start, int64_t column) const {
    float y[kVector];
    if (run.is_vector<kVector>()) {
      load_across(v.data + column * v.stride, run.index - start, y);
    } else {
      const Array<float> vs(const_cast<float*>(v.data), DType::kF32);
      vs.load(run.moved(column * v.stride - start), y);
    }
    return dot(x, y);
  }

  ARC_TOPK_DEVICE static T dot(const T (&x)[kVector], const float (&y)[kVector]) {
    T sum = x[0] * static_cast<T>(y[0]);
    ARC_TOPK_UNROLL
    for (int j = 1; j < kVector; ++j) sum = sum + x[j] * static_cast<T>(y[j]);
    return sum;
  }

  // Elements that begin between two of a column's vectors of four: those that hold them are read
  // whole, and moved down by up to three. The last read has one of them, so it is within the
  // column.
  ARC_TOPK_DEVICE static void load_across(const float* column, int64_t at, float (&y)[kVector]) {
    const int by = static_cast<int>(at % 4);
    constexpr int kRead = (kVector + 3 + 3) / 4 * 4;
    alignas(16) float raw[kRead] = {};
    const int needed = kVector + by;
    ARC_TOPK_UNROLL
    for (int i = 0; i < kRead; i += 4) {
      if (i < needed) copy_aligned<16>(raw + i, column + at - by + i);
    }
    ARC_TOPK_UNROLL
    for (int j = 0; j < kRead - 2; ++j) raw[j] = by >= 2 ? raw[j + 2] : raw[j];
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) y[j] = by % 2 == 1 ? raw[j + 1] : raw[j];
  }

  template <class Block>
  ARC_TOPK_DEVICE void write(Block& block, const Segment& s, int64_t row, bool part, int64_t k,
                             const FourSums& sums) const {
    T* sketch = static_cast<T*>(b.first) + s.sketch + row * b.sketch_dim;
    if (part) sketch = partial(block.index());
    ARC_TOPK_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (k + c < b.sketch_dim) sketch[k + c] = part ? sums.value[c] : sums.value[c] * sketch_scale;
    }
  }

  ARC_TOPK_DEVICE T* partial(int64_t piece) const {
    return static_cast<T*>(Scratch(b).partial) + piece * b.sketch_dim;
  }

  template <class Block>
  ARC_TOPK_DEVICE void add_parts(Block& block, Shared& shared, const Segment& s,
                                 const Piece& p) const {
    const int64_t first = find_piece(b, p.segment, p.row_begin);
    const auto columns = static_cast<uint32_t>(p.col_end - p.col_begin);
    if (!is_last(block, Scratch(b).arrived + first, columns, static_cast<uint32_t>(s.cols),
                 shared.last))
      return;
    block.each([&](int t) {
      for (int64_t k = t; k < b.sketch_dim; k += kThreads) {
        T sum = 0;
        for (int64_t i = first;; ++i) {
          sum = sum + block.fresh(partial(i) + k);
          if (b.pieces[i].col_end == s.cols) break;
        }
        static_cast<T*>(b.first)[s.sketch + p.row_begin * b.sketch_dim + k] = sum * sketch_scale;
      }
      if (t != 0 || !levels.used) return;
      double squares = 0;
      for (int64_t i = first;; ++i) {
        squares += block.fresh(Scratch(b).squares + i);
        if (b.pieces[i].col_end == s.cols) break;
      }
      write_share(s, p.row_begin, squares);
    });
  }

  // The last block knows what became of all of them: this rank's flags.
  template <class Block>
  ARC_TOPK_DEVICE void finish(Block& block, Shared& shared) const {
    if (!is_last(block, Scratch(b).counters, 1, static_cast<uint32_t>(block.blocks()), shared.last))
      return;
    block.each([&](int t) {
      for (int64_t i = t; i < b.num_segments; i += kThreads) {
        b.outcome[i] = Outcome::kNormal;
        const Segment& s = b.segments[i];
        if (s.compressed()) write_flag(b, s.flag, b.used[i] != 0, block.fresh(b.bad + i) != 0);
      }
    });
  }
};

}  // namespace arc_topk::cuda
