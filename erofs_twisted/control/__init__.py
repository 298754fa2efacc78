"""The control socket of a daemon: HTTP and JSON on a UNIX socket."""
