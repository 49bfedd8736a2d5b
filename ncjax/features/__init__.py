"""Measures neural collapse of features from anywhere."""
