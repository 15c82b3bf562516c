// The layout of one bucket: which tensors are compressed, how many rows each keeps, and where in
// the payloads everything lies. Data only, below compressors, state and exchange alike;
// compress/make_plan.h fills it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "config.h"

namespace arc_topk {

// What the plan needs to know of a tensor.
struct Shape {
  int64_t numel;
  int64_t dims;
  int64_t rows;     // size of the slowest-varying dimension in memory: natural rows
  uint32_t stream;  // an identity of the tensor that no bucket rebuild changes, equal on all ranks
  std::optional<double> ratio{};  // none: the configuration's
};

// The number types of one bucket.
struct Types {
  DType gradient;
  DType state;
  DType sketch;  // what the first payload travels in; it is made, and read, in the work type. kU8:
                 // low rank's on an uint8 wire, which has a payload of its own for that
  DType wire;    // what the second one is
  DType dense;   // what a dense tensor rides in: it has no state to feed a rounding back from
  int64_t norm_bytes = 0;  // of a column of P, where directions travel: of every rank its own

  DType work() const { return work_type(gradient); }
  // An uint8 wire carries integers, each row or column in a unit of its own. What a row's is made
  // from travels beside its sketch; a column's is kept beside its P.
  int64_t units() const { return wire == DType::kU8 ? 1 : 0; }
  bool sends_directions() const { return sketch == DType::kU8; }
  // Numbers that a flag consists of: a sum of bytes has no infinity.
  int64_t flag_numbers() const { return sends_directions() ? 2 : 1; }
  bool dense_in_first() const { return dense == sketch; }
};

// One tensor as the compressor sees it, whatever bucket it is in.
struct Matrix {
  int64_t rows;  // m
  int64_t cols;  // n
  double ratio;
  int64_t kept;  // K, low rank: k; 0: stays dense
  int64_t wire_bytes;
  int64_t dense_bytes;
  int64_t state_bytes;
  int64_t resync_bytes;   // handed to the collectives in a step that resyncs, on top
  std::string why_dense;  // empty when compressed
};

struct Plan {
  Types types;
  std::vector<Segment> segments;
  int64_t numel = 0;
  int64_t max_cols = 0;  // of the compressed tensors: rows of V needed
  bool dense = true;     // no tensor is compressed
  bool in_place = true;  // and all ride in the gradient's type: the bucket itself is the payload

  // Elements in each buffer; the compressor decides what lies in them (Compressor::lay_out).
  int64_t num_flags = 0;
  int64_t num_large = 0;
  int64_t num_picks = 0;
  std::vector<FactorPlace> factors;  // low rank: a segment each
  int64_t num_left = 0;              // low rank: elements of all left factors,
  int64_t num_right = 0;             // of all right ones,
  int64_t num_partial = 0;           // and of their sums over strips or windows
  int64_t first_numel = 0;           // work type, travels in the sketch's
  int64_t direction_bytes = 0;       // or these do in its place
  int64_t second_numel = 0;          // wire type
  int64_t flags_at = 0;              // element within the payload that carries the flags
  bool flags_in_first = true;

  // A dense tensor's place, behind what its payload holds so far.
  void append_dense(Segment& s) {
    s.dense_in_first = types.dense_in_first();
    int64_t& payload = s.dense_in_first ? first_numel : second_numel;
    s.packed = payload;
    payload += s.numel;
  }

  int64_t resync_every = 0;  // steps from one resync of h to the next; 0: never

  int64_t wire_bytes = 0;   // handed to the collectives, a rank and step
  int64_t dense_bytes = 0;  // what averaging without compression would hand over
};
// The work on these segments in pieces as a device wants them.
std::vector<Piece> cut_into_pieces(const std::vector<Segment>& segments, Grain grain);
// The compressed ones in tiles: the grain's columns of kStripRows rows, each an own sum.
std::vector<Piece> cut_into_tiles(const std::vector<Segment>& segments, Grain grain);
bool splits_rows(const std::vector<Piece>& pieces, const std::vector<Segment>& segments);

}  // namespace arc_topk
