"""mount(2), umount2(2), and what /proc says of mounts."""
