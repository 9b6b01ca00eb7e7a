"""Sampling: what a request may ask for, and how a token is chosen. Imports no torch."""

from flume_weight.sampling.batch import greedy, sample_rows
from flume_weight.sampling.params import InvalidSampling, SamplingParams
from flume_weight.sampling.sampler import FinishReason, Sampled, Sampler

__all__ = [
    "FinishReason",
    "InvalidSampling",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "greedy",
    "sample_rows",
]
