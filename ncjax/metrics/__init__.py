"""Defines the metrics: their vocabulary, formulas and theory, in functions of arrays alone.

Public are the metrics one by one, imported when asked for: `ncjax.metrics.nc1(features, labels)`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
