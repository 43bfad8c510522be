"""An HTTP/1.1 server of the standard library: uploads by checksum, downloads of any size, readers and writers
that take their time."""

import hashlib
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = bytes(range(256)) * 256


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def pieces(self):
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            return
        left = int(self.headers.get("content-length", 0))
        while left:
            piece = self.rfile.read(min(left, 65536))
            if not piece:
                raise ConnectionError("the body ends early")
            left -= len(piece)
            yield piece

    def do_PUT(self):
        pause = float(self.path.rpartition("/")[2]) if self.path.startswith("/slow/") else 0
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces():
            digest.update(piece)
            size += len(piece)
            if pause:
                time.sleep(pause)
        self.answer(f"{size} {digest.hexdigest()}\n".encode())

    def do_GET(self):
        if self.path.startswith("/bytes/"):
            left = int(self.path.rpartition("/")[2])
            self.send_response(200)
            self.send_header("content-length", str(left))
            self.end_headers()
            while left:
                piece = PIECE[: min(left, len(PIECE))]
                self.wfile.write(piece)
                left -= len(piece)
        elif self.path == "/long":
            self.answer(f"{len(self.headers.get('x-long', ''))}\n".encode())
        else:
            self.answer(f"{self.command} {self.path} {self.headers.get('host')}\n".encode())


class Server(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True


Server(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
