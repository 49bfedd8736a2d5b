"""Turns a named data set into balanced arrays."""
