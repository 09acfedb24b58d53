"""Modules that one call computes together."""
