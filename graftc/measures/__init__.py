"""Measures of a model on data: locality of attention, influence of blocks, statistics of activations."""

from graftc.measures.measure import DEFAULT_SAMPLES, Measuring, default_cache, measure

__all__ = ["DEFAULT_SAMPLES", "Measuring", "default_cache", "measure"]
