"""Whether and where one could listen. Asks the kernel, starts nothing that stays."""

import socket

from deploy.errors import ClusterError


def require_free_port(host: str, port: int) -> None:
    """Raises ClusterError when another process listens there."""
    if not port_is_free(host, port):
        raise ClusterError(
            f"cluster.port={port} is taken on {host}; nothing was started: choose another with --port"
        )


def port_is_free(host: str, port: int) -> bool:
    """Whether this process could listen on host:port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
