"""A weight engine whose model fails for certain token ids, as a kernel might for one shape or one value.

python -m faulty_weight_engine … In the middle of a step: queries and keys of a layer have left by then.
"""

from __future__ import annotations

import os
import sys

from flume_weight import engine_process
from flume_weight.model import Transformer, load_model

RAISES = 77  # a step with this token id among its tokens raises
KILLS = 78  # ends the process without a word, as a fault in native code does


class Faulty(Transformer):
    def forward(self, token_ids, *rest):
        self.token_ids = token_ids.tolist()
        return super().forward(token_ids, *rest)

    def _feed_forward(self, layer, hidden):
        if layer is self.weights.layers[-1]:
            if KILLS in self.token_ids:
                os.abort()
            if RAISES in self.token_ids:
                raise RuntimeError("no kernel for this token")
        return super()._feed_forward(layer, hidden)


def load(*args, **kwargs):
    model = load_model(*args, **kwargs)
    model.__class__ = Faulty
    return model


if __name__ == "__main__":
    engine_process.load_model = load
    sys.exit(engine_process.main())
