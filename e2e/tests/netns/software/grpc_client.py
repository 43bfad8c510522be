"""grpcio's client: every kind of call, and how calls end."""

import queue
import sys
import time

import grpc

channel = grpc.insecure_channel(
    sys.argv[1],
    options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)],
)
done = []


def unary(name):
    return channel.unary_unary(f"/lab.Lab/{name}")


# Unary, metadata both ways, binary included.
for i in range(50):
    blob = bytes([i, 0, 255])
    body, call = unary("Unary").with_call(b"m%d" % i, timeout=10, metadata=(("x-meta", f"v{i}"), ("x-bin-bin", blob)))
    assert body == b"m%d" % i
    assert ("x-initial", "1") in [tuple(m) for m in call.initial_metadata()]
    trailing = {m.key: m.value for m in call.trailing_metadata()}
    assert trailing["x-seen"] == f"v{i}" and trailing["x-bin-bin"] == blob, trailing
done.append("50 unary with metadata")

# A large message, both ways.
large = bytes(range(256)) * (64 * 1024)
assert unary("Unary")(large, timeout=60) == large
done.append("16 MiB message")

# Streams.
assert [int(x) for x in channel.unary_stream("/lab.Lab/Count")(b"1000", timeout=30)] == list(range(1000))
assert int(channel.stream_unary("/lab.Lab/Total")((b"x" * 1000 for _ in range(1000)), timeout=30)) == 1_000_000
to_send = queue.Queue()
answers = channel.stream_stream("/lab.Lab/Chat")(iter(to_send.get, None), timeout=30)
for i in range(100):
    # Each waits for the answer before: a stream that is buffered anywhere would stall here.
    to_send.put(b"%d" % i)
    assert next(answers) == b"echo %d" % i
to_send.put(None)
assert list(answers) == []
done.append("server, client and bidirectional streams")

# An error that comes as trailers alone.
try:
    unary("Fail")(b"", timeout=10)
    raise SystemExit("no error")
except grpc.RpcError as e:
    assert e.code() == grpc.StatusCode.FAILED_PRECONDITION and e.details() == "not ready: \u00e4", e
try:
    unary("Nothing")(b"", timeout=10)
    raise SystemExit("no error")
except grpc.RpcError as e:
    assert e.code() == grpc.StatusCode.UNIMPLEMENTED, e
done.append("trailers-only errors")


def ended(n):
    begun = time.time()
    while int(unary("Cancelled")(b"", timeout=10)) < n:
        assert time.time() - begun < 10, "the server does not learn of it"
        time.sleep(0.02)


# A deadline: the client gets its status in time, and the server learns of it.
begun = time.time()
try:
    unary("Slow")(b"", timeout=0.3)
    raise SystemExit("no error")
except grpc.RpcError as e:
    assert e.code() == grpc.StatusCode.DEADLINE_EXCEEDED, e
assert 0.2 < time.time() - begun < 3
ended(1)
done.append("deadline")

# Cancellation reaches the server.
call = unary("Slow").future(b"", timeout=30)
time.sleep(0.2)
call.cancel()
ended(2)
done.append("cancellation")
print(", ".join(done))
