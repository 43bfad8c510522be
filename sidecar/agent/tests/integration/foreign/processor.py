"""An external processor whose replies a request asks for in its header x-t-do, several divided by blanks.

It says its port on standard output and ends with its standard input.
"""

import sys
import time
from concurrent import futures

import grpc
from envoy.config.core.v3 import base_pb2 as core
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from envoy.type.v3 import http_status_pb2 as status

ACTION = core.HeaderValueOption.HeaderAppendAction


def values(message):
    return {h.key: (h.raw_value or h.value.encode()).decode() for h in message.headers.headers}


def option(key, value, action="OVERWRITE_IF_EXISTS_OR_ADD", append=None):
    header = core.HeaderValue(key=key, raw_value=value.encode())
    out = core.HeaderValueOption(header=header, append_action=ACTION.Value(action))
    if append is not None:
        out.append.value = append
    return out


def mutation(options, remove=()):
    return pb.HeaderMutation(set_headers=options, remove_headers=remove)


class Processor(pb_grpc.ExternalProcessorServicer):
    def Process(self, requests, context):
        todo, seen = [], []
        for r in requests:
            kind = r.WhichOneof("request")
            message = getattr(r, kind)
            end = getattr(message, "end_of_stream", False)
            seen.append(kind + ("!" if end else ""))
            out = pb.ProcessingResponse()
            if kind == "request_headers":
                headers = values(message)
                todo = headers.get("x-t-do", "").split()
            if kind in todo_fail(todo):
                context.abort(grpc.StatusCode.INTERNAL, "asked for")
            if "close:" + kind in todo:
                return
            if "slow:" + kind in todo:
                if "more" in todo:
                    out.override_message_timeout.FromSeconds(3)
                    yield out
                    out = pb.ProcessingResponse()
                time.sleep(1)
            if "immediate:" + kind in todo:
                i = out.immediate_response
                i.status.CopyFrom(status.HttpStatus(code=403))
                i.headers.CopyFrom(mutation([option("x-t-why", "asked")]))
                i.body = b"no " + kind.encode()
                i.details = "asked"
                yield out
                return
            if "wrong:" + kind in todo:
                out.response_trailers.SetInParent()
                yield out
                continue
            if kind in ("request_headers", "response_headers"):
                common = getattr(out, kind).response
                options = [option("x-t-" + kind.split("_")[0], "seen")]
                remove = []
                if kind == "request_headers":
                    options += [option("x-t-many", "b", append=True), option("x-t-one", "b", append=False)]
                    options += [option("x-t-many", "c", "ADD_IF_ABSENT"), option("x-t-new", "d", "ADD_IF_ABSENT")]
                    options += [option("x-t-none", "e", "OVERWRITE_IF_EXISTS")]
                    remove = ["x-t-remove"]
                    if "routing" in todo:
                        options += [option("host", "evil.example"), option(":method", "PUT")]
                        options += [option(":path", "/elsewhere"), option("x-envoy-t", "1")]
                    if "reroute" in todo:
                        options += [option("x-t-route", "other")]
                        common.clear_route_cache = True
                else:
                    options += [option("x-t-seen", ",".join(seen))]
                    if "status" in todo:
                        options += [option(":status", "418")]
                common.header_mutation.CopyFrom(mutation(options, remove))
                if "replace:" + kind in todo:
                    common.status = pb.CommonResponse.CONTINUE_AND_REPLACE
                    common.body_mutation.body = b"replaced"
                for word in todo:
                    if word.startswith("mode:"):
                        for part in word[5:].split(","):
                            field, value = part.split("=")
                            setattr(out.mode_override, field, int(value))
            elif kind in ("request_body", "response_body"):
                common = getattr(out, kind).response
                common.SetInParent()
                if "upper" in todo:
                    common.body_mutation.body = message.body.upper()
                elif "clear" in todo:
                    common.body_mutation.clear_body = True
                    # Envoy takes a body of another length only with the header that said it.
                    common.header_mutation.remove_headers.append("content-length")
                elif "mark" in todo:
                    common.body_mutation.body = message.body + (b"<end>" if end else b"<part>")
                if "body-headers" in todo:
                    common.header_mutation.CopyFrom(mutation([option("x-t-body", str(len(message.body)))]))
            else:
                getattr(out, kind).header_mutation.CopyFrom(mutation([option("x-t-trailer", "seen")]))
            yield out


def todo_fail(todo):
    return [t[5:] for t in todo if t.startswith("fail:")]


server = grpc.server(futures.ThreadPoolExecutor(max_workers=64))
pb_grpc.add_ExternalProcessorServicer_to_server(Processor(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
server.stop(0)
