"""What is known of each mount, for other processes to read."""
