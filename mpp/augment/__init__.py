"""What becomes of an image: drawn (plan) and done, one at a time on a CPU or for a batch on a device (batched)."""
