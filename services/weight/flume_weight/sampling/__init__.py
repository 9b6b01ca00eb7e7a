"""Sampling: what a request may ask for, and how a token is chosen. Imports no torch."""

from flume_weight.sampling.batch import NotSampled, Outcome, greedy, sample_rows, sample_shortlisted
from flume_weight.sampling.invalid import InvalidLogits
from flume_weight.sampling.params import InvalidSampling, SamplingParams
from flume_weight.sampling.sampler import FinishReason, Sampled, Sampler
from flume_weight.sampling.shortlist import CANDIDATES, Ask, Shortlist

__all__ = [
    "CANDIDATES",
    "Ask",
    "FinishReason",
    "InvalidLogits",
    "InvalidSampling",
    "NotSampled",
    "Outcome",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "Shortlist",
    "greedy",
    "sample_rows",
    "sample_shortlisted",
]
