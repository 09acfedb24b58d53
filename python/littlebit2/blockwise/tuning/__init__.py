"""Tuning: of one block to its output, and of the whole model to its own."""
