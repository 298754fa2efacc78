"""A Network Block Device server: the protocol without I/O, and thin Twisted classes over it."""
