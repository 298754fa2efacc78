"""Blobs by chunks: fetched once, kept in a file, served from there."""
