"""Bundled recipes, each a YAML file whose first comment gives the source of its numbers and the expected result."""
