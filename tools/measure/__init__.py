"""Measures speed, and compares quantizers and ways to score."""
