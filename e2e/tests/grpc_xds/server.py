"""grpcio's server, plain or told by xDS what to accept: server.py NAME ADDRESS [xds]. It ends with its standard input."""

import collections
import os
import sys
import threading
import time
from concurrent import futures

import grpc

NAME, ADDRESS = sys.argv[1:3]
TRIES = collections.Counter()
LOCK = threading.Lock()


def peer(context):
    """Who calls, as the certificate says."""
    ids = context.auth_context().get("peer_spiffe_id") or [b""]
    return ids[0].decode()


def hello(request, context):
    return f"{NAME} {peer(context)}".encode()


def bad(request, context):
    """One of several servers that cannot do its work."""
    if NAME.endswith("broken"):
        context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
    return NAME.encode()


def flaky(request, context):
    """Fails as often as the request says, and then tells how often it was tried."""
    meta = dict(context.invocation_metadata())
    with LOCK:
        TRIES[meta["x-key"]] += 1
        tries = TRIES[meta["x-key"]]
    if tries <= int(meta["x-fail"]):
        context.abort(grpc.StatusCode.UNAVAILABLE, f"try {tries}")
    return f"{NAME} {tries}".encode()


def slow(request, context):
    time.sleep(float(dict(context.invocation_metadata()).get("x-seconds", "2")))
    return NAME.encode()


METHODS = {
    "Hello": grpc.unary_unary_rpc_method_handler(hello),
    "Other": grpc.unary_unary_rpc_method_handler(hello),
    "Bad": grpc.unary_unary_rpc_method_handler(bad),
    "Flaky": grpc.unary_unary_rpc_method_handler(flaky),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
}
xds = sys.argv[3:] == ["xds"]
server = grpc.server(futures.ThreadPoolExecutor(32), xds=xds)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("greeter.Greeter", METHODS)])
if xds:
    server.add_secure_port(ADDRESS, grpc.xds_server_credentials(grpc.insecure_server_credentials()))
else:
    server.add_insecure_port(ADDRESS)
server.start()
print("{}", flush=True)
sys.stdin.read()
os._exit(0)
