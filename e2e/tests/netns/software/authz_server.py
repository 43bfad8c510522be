"""An authoriser that says yes to `x-ext-authz: allow`, over HTTP (first argument: port) and gRPC (second)."""

import sys
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from google.rpc import code_pb2, status_pb2


class Http(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        ok = self.headers.get("x-ext-authz") == "allow"
        body = b"" if ok else b"denied by the authoriser"
        self.send_response(200 if ok else 403)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-ext-authz-check-result", "allowed" if ok else "denied")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *args):
        print("http", self.path, self.headers.get("x-ext-authz"), flush=True)


class Grpc(external_auth_pb2_grpc.AuthorizationServicer):
    def Check(self, request, context):
        a = request.attributes
        print("grpc", a.source.principal, a.destination.address.socket_address.port_value, a.request.http.path, flush=True)
        # Of connections there are no headers: its port says which ones may come in.
        http = a.request.http.headers.get("x-ext-authz") == "allow"
        bytes_ok = not a.request.http.path and a.destination.address.socket_address.port_value == 9001
        if http or bytes_ok:
            return external_auth_pb2.CheckResponse(status=status_pb2.Status(code=code_pb2.OK))
        return external_auth_pb2.CheckResponse(status=status_pb2.Status(code=code_pb2.PERMISSION_DENIED))


if __name__ == "__main__":
    server = grpc.server(futures.ThreadPoolExecutor(4))
    external_auth_pb2_grpc.add_AuthorizationServicer_to_server(Grpc(), server)
    server.add_insecure_port(f"0.0.0.0:{sys.argv[2]}")
    server.start()
    ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Http).serve_forever()
