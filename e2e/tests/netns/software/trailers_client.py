"""Chunks with trailers, by hand, since few clients send them."""

import socket
import sys

s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
s.sendall(
    b"POST /t HTTP/1.1\r\nHost: %b\r\nTE: trailers\r\nConnection: close, TE\r\nTransfer-Encoding: chunked\r\n"
    b"Trailer: x-sum\r\n\r\n5;ext=1\r\nhello\r\n0\r\nX-Sum: abc\r\n\r\n" % sys.argv[1].encode()
)
out = b""
while piece := s.recv(65536):
    out += piece
assert out.startswith(b"HTTP/1.1 200"), out
assert b"hello" in out and b"POST /t\n" in out, out
assert out.rstrip().lower().endswith(b"x-checked: abc"), out
print("request trailer to the server, response trailer back")
