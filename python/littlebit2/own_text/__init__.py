"""Text that a dense model writes itself, for tuning a quantized one where no other text is at hand."""

from .run import WrittenText, write_text

__all__ = ["WrittenText", "write_text"]
