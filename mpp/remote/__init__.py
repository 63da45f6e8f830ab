"""Files by URL: which are taken (urls), how they are read (streams), whole (fetch), and kept for a while (cache)."""
