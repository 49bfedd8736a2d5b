"""Parses command lines, one module a command; knows exit codes."""
