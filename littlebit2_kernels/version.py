"""The one place that holds the package version (CMake and the packaging metadata read this file)."""

__version__ = "0.1.0"
