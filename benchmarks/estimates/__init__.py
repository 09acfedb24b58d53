"""Predicted costs of GPU calls: counted, not measured."""
