"""A collector of spans (OTLP over gRPC and HTTP, Zipkin) and of log entries (Envoy's service, OTLP).

It says its ports on standard output, for gRPC and for HTTP, then each thing that it gets as a line of JSON.
"""

import json
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from envoy.service.accesslog.v3 import als_pb2 as als
from envoy.service.accesslog.v3 import als_pb2_grpc as als_grpc
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace

LOCK = threading.Lock()


def say(kind, value):
    with LOCK:
        print(json.dumps({"kind": kind, "value": value}, sort_keys=True), flush=True)


def texts(attributes):
    return {a.key: a.value.string_value for a in attributes}


def spans(request):
    for resource in request.resource_spans:
        for scope in getattr(resource, "scope_spans", None) or getattr(resource, "instrumentation_library_spans", []):
            for s in scope.spans:
                say("span", {
                    "resource": texts(resource.resource.attributes),
                    "trace": s.trace_id.hex(),
                    "id": s.span_id.hex(),
                    "parent": s.parent_span_id.hex(),
                    "name": s.name,
                    "kind": s.kind,
                    "took": s.end_time_unix_nano - s.start_time_unix_nano,
                    "status": s.status.code,
                    "tags": texts(s.attributes),
                })


def export_spans(request, context):
    spans(request)
    return trace.ExportTraceServiceResponse()


def export_logs(request, context):
    for resource in request.resource_logs:
        for scope in getattr(resource, "scope_logs", None) or getattr(resource, "instrumentation_library_logs", []):
            for r in getattr(scope, "log_records", None) or scope.logs:
                say("record", {"body": r.body.string_value, "attributes": texts(r.attributes),
                               "trace": r.trace_id.hex(), "time": r.time_unix_nano > 10 ** 18})
    return logs.ExportLogsServiceResponse()


class Entries(als_grpc.AccessLogServiceServicer):
    def StreamAccessLogs(self, requests, context):
        name = ""
        for r in requests:
            name = r.identifier.log_name or name
            for e in list(r.http_logs.log_entry) + list(r.tcp_logs.log_entry):
                say("entry", {"log": name, "entry": MessageToDict(e, preserving_proto_field_name=True)})
        return als.StreamAccessLogsResponse()


class Posts(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while n := int(self.rfile.readline(), 16):
                body += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/api/v2/spans":
            for s in json.loads(body):
                say("zipkin", {**s, "key": self.headers.get("x-key")})
        elif self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf":
            request = trace.ExportTraceServiceRequest()
            request.ParseFromString(body)
            spans(request)
        self.send_response(200 if self.path == "/v1/traces" else 202)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def unary(method, request, reply):
    return grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=request.FromString, response_serializer=reply.SerializeToString)


def service(name, handler):
    return grpc.method_handlers_generic_handler(name, {"Export": handler})


server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
als_grpc.add_AccessLogServiceServicer_to_server(Entries(), server)
server.add_generic_rpc_handlers((
    service("opentelemetry.proto.collector.trace.v1.TraceService",
            unary(export_spans, trace.ExportTraceServiceRequest, trace.ExportTraceServiceResponse)),
    service("opentelemetry.proto.collector.logs.v1.LogsService",
            unary(export_logs, logs.ExportLogsServiceRequest, logs.ExportLogsServiceResponse)),
))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
posts = ThreadingHTTPServer(("127.0.0.1", 0), Posts)
with LOCK:
    print(port, posts.server_address[1], flush=True)
posts.serve_forever()
