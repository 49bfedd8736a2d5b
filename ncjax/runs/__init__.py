"""Runs a plan into a WORKDIR: the loop, several processes, signals; reads what a WORKDIR holds."""
