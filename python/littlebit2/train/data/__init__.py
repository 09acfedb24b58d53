"""Text into blocks of tokens: files are streamed once into a file of token ids, then memory-mapped."""

from .blocks import TokenBlocks
from .sources import SUFFIXES, find_files, read_texts
from .tokens import TokenFile, surroundings, write_tokens

__all__ = ["SUFFIXES", "TokenBlocks", "TokenFile", "find_files", "read_texts", "surroundings", "write_tokens"]
