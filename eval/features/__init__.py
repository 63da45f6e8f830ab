"""Frozen features of the images of a split."""
