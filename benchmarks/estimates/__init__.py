"""Predicted costs of GPU calls and of loops on other CPUs: counted, not measured."""
