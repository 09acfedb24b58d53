"""What a call will do, without doing it: plans of the native planners, and ``explain``."""
