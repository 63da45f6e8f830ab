"""Shards to batches: config -> chosen images -> order of positions -> pictures -> batches; read opens them."""
