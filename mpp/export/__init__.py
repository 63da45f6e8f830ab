"""Weights out: `convert` writes a folder that other libraries load, with a model card."""
