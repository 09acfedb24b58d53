"""Errors and perplexities of quantized and trained models."""
