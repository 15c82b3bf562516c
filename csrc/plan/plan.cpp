#include "plan/plan.h"

#include <algorithm>

namespace arc_topk {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::vector<Piece> cut_into_pieces(const std::vector<Segment>& segments, Grain grain) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    const int64_t rows = std::max<int64_t>(1, grain.numel / std::max<int64_t>(1, s.cols));
    // A long row is cut into equal parts, all but the last a multiple of 64 elements long.
    const int64_t parts =
        grain.splits_rows ? divide_up(std::max<int64_t>(1, s.cols), grain.numel) : 1;
    const int64_t cols = parts == 1 ? s.cols : divide_up(divide_up(s.cols, parts), 64) * 64;
    for (int64_t row = 0; row < s.rows; row += rows) {
      for (int64_t col = 0; col < s.cols; col += cols) {
        pieces.push_back({static_cast<uint32_t>(i), static_cast<uint32_t>(row),
                          static_cast<uint32_t>(std::min(row + rows, s.rows)),
                          static_cast<uint32_t>(col),
                          static_cast<uint32_t>(std::min(col + cols, s.cols))});
      }
    }
  }
  return pieces;
}

std::vector<Piece> cut_into_tiles(const std::vector<Segment>& segments, Grain grain) {
  std::vector<Piece> tiles;
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    if (!s.compressed()) continue;
    for (int64_t row = 0; row < s.rows; row += kStripRows) {
      for (int64_t col = 0; col < s.cols; col += grain.tile_cols) {
        tiles.push_back({static_cast<uint32_t>(i), static_cast<uint32_t>(row),
                         static_cast<uint32_t>(std::min(row + kStripRows, s.rows)),
                         static_cast<uint32_t>(col),
                         static_cast<uint32_t>(std::min(col + grain.tile_cols, s.cols))});
      }
    }
  }
  return tiles;
}

bool splits_rows(const std::vector<Piece>& pieces, const std::vector<Segment>& segments) {
  return std::any_of(pieces.begin(), pieces.end(), [&](const Piece& p) {
    return p.col_end - p.col_begin < segments[static_cast<size_t>(p.segment)].cols;
  });
}

}  // namespace arc_topk
