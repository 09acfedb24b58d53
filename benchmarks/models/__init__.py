"""Whole models of random weights."""
