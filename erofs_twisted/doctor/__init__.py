"""What is wrong with mounts, and with the machine: found, told, and repaired where that is safe."""
