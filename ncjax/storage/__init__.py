"""Keeps history, checkpoints and other files of a WORKDIR whole."""
