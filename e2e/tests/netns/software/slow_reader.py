"""Reads a download slowly for a while, then to its end."""

import socket
import sys
import time

host, port, size, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
s = socket.create_connection((host, port), 60)
s.sendall(b"GET /bytes/%d HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (size, host.encode()))
got, begun = 0, time.time()
while piece := s.recv(16384):
    got += len(piece)
    if time.time() - begun < seconds:
        time.sleep(0.05)
assert got > size, got
print(f"{size >> 20} MiB, slow for {seconds:.0f} s")
