"""Folders of WebDataset tars: making them (sources, prepare, write), indexing them (tar, labels, build, build_urls ->
index), and knowing what they hold (sweep -> check, stats, duplicates)."""
