// Low rank's steps, compiled once for each instruction set, as rows.cpp is.
#pragma GCC optimize("no-math-errno")

#include "kernels/cpu/low_rank_steps.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

extern const LowRankSteps low_rank_steps;
const LowRankSteps low_rank_steps = {
    .draw = draw,
    .pending = pending,
    .forget = forget,
    .orthonormalise = orthonormalise,
    .send = send,
    .receive = receive,
    .reclaim = reclaim_factor,
    .send_directions = send_directions,
    .prepare = prepare_message,
    .settle = settle,
    .apply = apply_factors,
    .multiply_back = multiply_back,
};

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
