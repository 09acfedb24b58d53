"""Dense rows in int8 with a float32 scale each: rounding, and the modules that compute on them."""

from .layers import Int8Embedding, Int8Linear, int8_rows_linear
from .rounding import dequantize_rows, quantize_rows

__all__ = ["Int8Embedding", "Int8Linear", "dequantize_rows", "int8_rows_linear", "quantize_rows"]
