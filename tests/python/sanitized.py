"""A short run of real DDP under AddressSanitizer (`make asan`): every compressor and feedback.

2 ranks, buckets that are rebuilt, one engine let go as the next is made. Whatever the sanitizer
finds ends the rank's process, which fails the run.
"""

from __future__ import annotations

import itertools

import torch
from model import random_gradients
from ranks import Pools
from test_engine import COMPRESSORS, FEEDBACKS, FLOAT32, LAYOUTS, check_against_oracle, run_native

import arc_topk

BUCKETS = {"bucket_cap_mb": 0.004}


def main() -> None:
    assert "asan" in arc_topk.__file__, f"{arc_topk.__file__} is not the build under a sanitizer"
    pools = Pools()
    for compressor, feedback in itertools.product(COMPRESSORS, FEEDBACKS):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, **FLOAT32}
        gradients = random_gradients(LAYOUTS, 2, 3, torch.float32)
        runs = pools.of(2).run(run_native, LAYOUTS, gradients, torch.float32, config, BUCKETS)
        check_against_oracle(runs, LAYOUTS, gradients, torch.float32, config)
    pools.close()
    print(f"{len(COMPRESSORS) * len(FEEDBACKS)} runs of 2 ranks under the sanitizer: clean")


if __name__ == "__main__":
    main()
