"""Engines that lie beside the tests, as processes: where they are found."""

import os
from pathlib import Path


def environment():
    """Ours, with which a new interpreter finds them."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
