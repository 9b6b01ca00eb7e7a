"""Logits that no token can be chosen from, and what is wrong with them."""

from __future__ import annotations

import math


class InvalidLogits(ValueError):
    """One row of logits has NaN or +inf in it, or nothing above -inf.

    `found` is the words for a person: "NaN logits", for example.
    """

    def __init__(self, found: str) -> None:
        super().__init__(found)
        self.found = found


def require_finite(largest: float) -> None:
    """Check a row by its largest logit, as numpy and torch give it: NaN as soon as there is one.

    Single tokens at -inf are legal: a model may forbid them. Raises InvalidLogits.
    """
    if math.isfinite(largest):
        return
    if math.isnan(largest):
        raise InvalidLogits("NaN logits")
    raise InvalidLogits("infinite logits" if largest > 0 else "logits that are all -inf")
