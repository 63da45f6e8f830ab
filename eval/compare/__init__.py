"""Comparisons: which runs they are made of, and what those show."""
