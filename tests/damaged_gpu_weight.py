"""As simulated_gpu_weight, with NaN for the embedding of one token: the one that DAMAGED_TOKEN names."""

from __future__ import annotations

import os
import sys

import simulated_gpu_weight

whole = simulated_gpu_weight.model


def damaged(*args, **kwargs):
    model = whole(*args, **kwargs)
    model.weights.embedding[int(os.environ["DAMAGED_TOKEN"])] = float("nan")
    return model


def main():
    simulated_gpu_weight.model = damaged
    return simulated_gpu_weight.main()


if __name__ == "__main__":
    sys.exit(main())
