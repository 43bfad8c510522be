"""grpcio's server, without generated code."""

import sys
import time
from concurrent import futures

import grpc


def unary(request, context):
    meta = dict(context.invocation_metadata())
    context.set_trailing_metadata((("x-seen", meta.get("x-meta", "")), ("x-bin-bin", meta.get("x-bin-bin", b""))))
    context.send_initial_metadata((("x-initial", "1"),))
    return request


def fail(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not ready: " + chr(0xE4))


def slow(request, context):
    begun = time.time()
    while context.is_active() and time.time() - begun < 20:
        time.sleep(0.01)
    CANCELLED.append(time.time() - begun)
    return request


def cancelled(request, context):
    return str(len(CANCELLED)).encode()


def count(request, context):
    for i in range(int(request)):
        yield str(i).encode()


def total(requests, context):
    return str(sum(len(r) for r in requests)).encode()


def chat(requests, context):
    for r in requests:
        yield b"echo " + r


CANCELLED = []
METHODS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
    "Cancelled": grpc.unary_unary_rpc_method_handler(cancelled),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Total": grpc.stream_unary_rpc_method_handler(total),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
}
server = grpc.server(
    futures.ThreadPoolExecutor(32),
    options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
)
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("lab.Lab", METHODS)])
server.add_insecure_port(f"0.0.0.0:{sys.argv[1]}")
server.start()
server.wait_for_termination()
