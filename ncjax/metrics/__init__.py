"""Defines the measurements and the theory beside them: pure arrays, no files."""
