"""A TCP server for half-closed connections: its first line says who ends first."""

import hashlib
import socket
import sys
import threading


def serve(s):
    f = s.makefile("rb")
    how = f.readline().strip()
    if how == b"client-first":
        # Answers when the client has ended its direction.
        digest = hashlib.sha256(f.read()).hexdigest()
        s.sendall(b"x" * 1_000_000 + digest.encode())
        s.close()
    elif how == b"server-first":
        # Ends its direction, and goes on reading.
        s.sendall(b"that is all")
        s.shutdown(socket.SHUT_WR)
        global LAST
        LAST = hashlib.sha256(f.read()).hexdigest()
        s.close()
    elif how == b"last":
        s.sendall(LAST.encode())
        s.close()
    else:
        # Echo, for as long as the client wants.
        s.sendall(how + b"\n")
        for line in f:
            s.sendall(line)
        s.close()


LAST = ""
threading.stack_size(128 * 1024)
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=4096)
while True:
    conn, _ = listener.accept()
    threading.Thread(target=serve, args=(conn,), daemon=True).start()
