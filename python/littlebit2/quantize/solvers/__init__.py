"""The numerical methods behind the quantizer: they see matrices and paths, no layers and no configuration."""
