"""Images: to shards (sources, prepare, write), their index (tar, index, check), to batches (read, decode, augment)."""
