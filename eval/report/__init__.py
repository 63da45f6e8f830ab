"""The page that shows a comparison's results."""
