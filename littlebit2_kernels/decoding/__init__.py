"""What a step of decoding computes between its linear layers."""
