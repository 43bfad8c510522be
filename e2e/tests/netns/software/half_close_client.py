"""Half-closed connections, either side first."""

import hashlib
import socket
import sys
import time

host, port, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
payload = bytes(range(256)) * 8000
want = hashlib.sha256(payload).hexdigest().encode()


def everything(s):
    out = b""
    while piece := s.recv(65536):
        out += piece
    return out


s = socket.create_connection((host, port), 20)
s.sendall(how.encode() + b"\n")
if how == "client-first":
    s.sendall(payload)
    s.shutdown(socket.SHUT_WR)
    out = everything(s)
    assert out == b"x" * 1_000_000 + want, (len(out), out[-64:])
    print("2 MB up, end, then 1 MB and the checksum down")
else:
    assert everything(s) == b"that is all"
    time.sleep(0.3)
    s.sendall(payload)
    s.shutdown(socket.SHUT_WR)
    s.close()
    for _ in range(100):
        last = socket.create_connection((host, port), 20)
        last.sendall(b"last\n")
        if everything(last) == want:
            break
        time.sleep(0.05)
    else:
        raise SystemExit("the server did not get what came after its own end")
    print("server ends, then 2 MB up arrive whole")
