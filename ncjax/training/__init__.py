"""Trains and measures a whole grid in compiled programs."""
