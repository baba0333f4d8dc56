"""Reads the logs of runs and makes tables, pictures, pages and submissions of them."""
