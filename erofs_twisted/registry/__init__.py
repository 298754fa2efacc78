"""OCI images at their origin: references, manifests, authentication, and blobs by Range requests."""
