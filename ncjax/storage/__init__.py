"""Writes and reads the history, the checkpoints and other files of a WORKDIR."""
