"""Training with labels, and what classifiers and encoders say of images."""
