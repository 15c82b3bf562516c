// The kernels over rows, compiled once for each instruction set (ARC_TOPK_ISA names it).

// sqrt() of negative numbers sets errno, which nobody reads here and which keeps loops from
// vectorising.
#pragma GCC optimize("no-math-errno")

#include "kernels/cpu/rows.h"

#include "kernels/cpu/apply.h"
#include "kernels/cpu/select.h"

#define ARC_TOPK_QUOTE(name) #name
#define ARC_TOPK_NAME_OF(name) ARC_TOPK_QUOTE(name)

namespace arc_topk::cpu::ARC_TOPK_ISA {

extern const Rows rows;
const Rows rows = {
    .isa = ARC_TOPK_NAME_OF(ARC_TOPK_ISA),
    .project = project,
    .has_nonzero = has_nonzero,
    .prepare = prepare,
    .undo = undo,
    .reclaim = reclaim,
    .score = score,
    .randomize = randomize,
    .magnitudes = magnitudes,
    .select32 = select_largest<uint32_t>,
    .select64 = select_largest<uint64_t>,
    .pack = pack,
    .apply = apply,
    .apply_gathered = apply_gathered,
    .copy_dense = copy_dense,
    .mark_dense = mark_dense,
    .apply_dense = apply_dense,
    .publish = publish,
    .remember = remember,
    .adopt = adopt,
    .divide = divide,
};

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
