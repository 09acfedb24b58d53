"""Layers: candidates beside their peers, the goals, the machine's floors, overhead."""
