"""Trains and measures a whole grid in one compiled program."""
