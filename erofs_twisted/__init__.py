"""Mount OCI images straight from their registry on the kernel's EROFS, lazily, over NBD."""

__version__ = "0.1.0"
