"""Exports as devices of the kernel: over netlink, or through FUSE."""
