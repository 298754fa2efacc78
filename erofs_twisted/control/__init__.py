"""The control socket of a daemon: HTTP and JSON on a UNIX socket."""

SOCKET = "control"
"""The socket's name in the state directory."""
