"""Many connections that do nothing after one request; a signal on standard input ends them."""

import selectors
import socket
import sys

host, port, count, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
request = b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode() if kind == "http" else b"hello\n"
end = b"\n" if kind != "http" else b"\r\n\r\n"
idle, selector, started, waiting = [], selectors.DefaultSelector(), 0, {}
while len(idle) < count:
    # A hundred at a time: the accept queue of a server is not what is tested.
    while started < count and len(waiting) < 100:
        s = socket.create_connection(address, 20)
        s.sendall(request)
        selector.register(s, selectors.EVENT_READ)
        waiting[s], started = b"", started + 1
    for key, _ in selector.select(20):
        s = key.fileobj
        piece = s.recv(65536)
        if not piece:
            raise SystemExit(f"closed after {len(idle)}")
        waiting[s] += piece
        if end in waiting[s]:
            if kind == "http" and not waiting[s].startswith(b"HTTP/1.1 200"):
                raise SystemExit(waiting[s])
            selector.unregister(s)
            del waiting[s]
            idle.append(s)
print("idle", flush=True)
sys.stdin.readline()
# All of them still serve.
for s in idle[:: max(1, count // 100)]:
    s.sendall(request)
    if not s.recv(65536):
        raise SystemExit("closed while idle")
print("served again", flush=True)
