"""The node service: one store and one arena for all processes of a node.

Service side: ``serve`` (``service``), which the command ``cascade-aio serve`` runs. Client side:
``connect`` (``client``). What they say to each other: ``PROTOCOL.md``.
"""

from cascade_aio.daemon.client import ServiceStore, connect
from cascade_aio.daemon.service import Service, serve
from cascade_aio.daemon.settings import ServiceConfig, default_socket, socket_path_of

__all__ = ["Service", "ServiceConfig", "ServiceStore", "connect", "default_socket", "serve", "socket_path_of"]
