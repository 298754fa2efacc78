"""The EROFS on-disk format, as far as a server of its blocks needs it."""
