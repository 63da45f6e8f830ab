"""What can be read off frozen features: one module a protocol, and the table of them."""
