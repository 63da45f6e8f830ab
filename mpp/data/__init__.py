"""Images: from folders to shards (write, index), and from shards to batches (read, decode, augment)."""
