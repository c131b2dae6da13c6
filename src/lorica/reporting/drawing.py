"""What the figures use of Matplotlib, which is imported here only."""

from __future__ import annotations

import os
from contextlib import suppress

# In a notebook's environment MPLBACKEND may name a backend that is not installed here, and then Matplotlib cannot be
# imported. Lorica's figures need none.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    from matplotlib import rc_context, rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline
    from matplotlib.ticker import MaxNLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
if _backend is not None:
    # As Matplotlib does, for the other figures of this process.
    with suppress(ValueError):
        rcParams["backend"] = _backend

__all__ = ["Axes", "Figure", "MaxNLocator", "Outline", "PathPatch", "Rectangle", "rc_context"]
