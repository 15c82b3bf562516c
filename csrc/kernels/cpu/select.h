// The K largest of m keys, without sorting and without memory of its own.
#pragma once

#include <cstdint>

namespace arc_topk::cpu {

// Writes the indices of the `kept` largest keys in ascending order; of equal keys the smaller index
// wins.
template <class Key>
void select_largest(const Key* keys, int64_t count, int64_t kept, int32_t* picks);

}  // namespace arc_topk::cpu
