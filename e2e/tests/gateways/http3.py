"""HTTP/3 to a gateway from aioquic, with servers behind it. Prints a line for each check; exits with 1 at the first
that fails. Arguments: address and port of the gateway, the port for the server, the root, a client's certificate and
key, and the process ID of the gateway."""

import asyncio, base64, hashlib, json, os, signal, sys, time

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.buffer import Buffer
from aioquic.h3.connection import H3_ALPN, FrameType, H3Connection, Setting
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, StreamDataReceived, StreamReset

IP, PORT, SERVER_PORT, ROOT, CERT, KEY, PID = sys.argv[1:8]
PORT, SERVER_PORT, PID = int(PORT), int(SERVER_PORT), int(PID)
HOST = "shop.example"


class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http, self.control = H3Connection(self._quic), b""
        self.streams, self.wake, self.end = {}, asyncio.Event(), None
        self.local = "127.0.0.1"

    def stream(self, sid):
        return self.streams.setdefault(sid, {"head": None, "body": bytearray(), "trailers": None, "end": False, "reset": None})

    @property
    def goaway(self):
        """Numbers in GOAWAY frames, which aioquic discards, on the control stream: the first of the server's."""
        buf, found = Buffer(data=self.control), ()
        buf.pull_uint_var()
        while not buf.eof():
            kind, data = buf.pull_uint_var(), buf.pull_bytes(buf.pull_uint_var())
            if kind == FrameType.GOAWAY:
                found += (Buffer(data=data).pull_uint_var(),)
        return found

    def quic_event_received(self, event):
        if isinstance(event, StreamDataReceived) and event.stream_id == 3:
            self.control += event.data
        if isinstance(event, ConnectionTerminated):
            self.end = event
        if isinstance(event, StreamReset):
            s = self.stream(event.stream_id)
            s["reset"], s["end"] = event.error_code, True
        for e in self.http.handle_event(event):
            s = self.stream(e.stream_id)
            if isinstance(e, HeadersReceived):
                s["trailers" if s["head"] else "head"] = {k.decode(): v.decode() for k, v in e.headers}
            if isinstance(e, DataReceived):
                s["body"] += e.data
            s["end"] = s["end"] or e.stream_ended
        self.wake.set()

    async def until(self, done, limit=60):
        deadline = time.monotonic() + limit
        while not done():
            left = deadline - time.monotonic()
            if left <= 0 or self.end:
                raise Exception(f"not in time, or ended: {self.end}")
            self.wake.clear()
            try:
                await asyncio.wait_for(self.wake.wait(), min(left, 1))
            except asyncio.TimeoutError:
                pass

    def open(self, method, path, headers=(), ended=True, pseudo=()):
        sid = self._quic.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "https"), (":authority", HOST), (":path", path)]
        fields = [(k.encode(), v.encode()) for k, v in [*fields, *pseudo, *headers]]
        self.http.send_headers(sid, fields, end_stream=ended)
        self.transmit()
        return sid

    async def ask(self, method, path, body=None, headers=(), trailers=None):
        sid = self.open(method, path, headers, ended=body is None and trailers is None)
        if body is not None:
            self.http.send_data(sid, body, end_stream=trailers is None)
        if trailers:
            self.http.send_headers(sid, [(k.encode(), v.encode()) for k, v in trailers], end_stream=True)
        self.transmit()
        await self.until(lambda: self.stream(sid)["end"])
        return self.stream(sid)


def dial(name=HOST, cert=False):
    c = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name=name)
    c.load_verify_locations(ROOT)
    c.idle_timeout = 20
    if cert:
        c.load_cert_chain(CERT, KEY)
    return connect(IP, PORT, configuration=c, create_protocol=Client)


def check(name, ok, what=""):
    print(("ok   " if ok else "FAIL ") + name, "" if ok else what, flush=True)
    if not ok:
        os._exit(1)


async def serve(reader, writer):
    """HTTP/1.1: /sum answers with what came, /echo with the same, /trailers with some, and takes WebSockets."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = {k.lower(): v for k, v in (l.split(": ", 1) for l in head[1:] if l)}
            path = head[0].split(" ")[1]
            if fields.get("upgrade") == "websocket":
                key = fields["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
                writer.write(f"HTTP/1.1 101 x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {accept}\r\n\r\n".encode())
                while data := await reader.read(65536):
                    writer.write(b"echo " + data)
                return writer.close()
            body, trailers = b"", {}
            if "content-length" in fields:
                body = await reader.readexactly(int(fields["content-length"]))
            elif fields.get("transfer-encoding") == "chunked":
                while n := int((await reader.readline()).split(b";")[0], 16):
                    body += await reader.readexactly(n)
                    await reader.readline()
                while (l := (await reader.readline()).decode().strip()):
                    k, v = l.split(": ", 1)
                    trailers[k] = v
            if path == "/slow":
                await asyncio.sleep(1.5)
            if path == "/echo":
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            elif path == "/trailers":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n4\r\nbody\r\n0\r\nx-sum: 42\r\n\r\n")
            else:
                seen = json.dumps({"line": head[0], "fields": fields, "length": len(body), "trailers": trailers,
                                   "sha256": hashlib.sha256(body).hexdigest()}).encode()
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(seen)}\r\n\r\n".encode() + seen)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def refused(name, cert=False):
    try:
        async with dial(name, cert) as c:
            # With TLS 1.3 a client learns late that its certificate is wanted.
            await c.ask("GET", "/")
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


async def main():
    await asyncio.start_server(serve, IP, SERVER_PORT, limit=1 << 20)
    async with dial() as c:
        r = await c.ask("GET", "/x?y=1", headers=[("cookie", "a=1"), ("cookie", "b=2")])
        seen = json.loads(r["body"])
        check("GET", r["head"][":status"] == "200" and seen["line"] == "GET /x?y=1 HTTP/1.1", r)
        f = seen["fields"]
        check("forwarded", (f["host"], f["x-forwarded-proto"], f["x-forwarded-for"], f["cookie"]) == (HOST, "https", c.local, "a=1; b=2"), f)
        check("alt-svc", r["head"].get("alt-svc") == f'h3=":{PORT}"; ma=86400', r["head"])
        check("no dynamic table", c.http.received_settings.get(Setting.QPACK_MAX_TABLE_CAPACITY, 0) == 0)

        body = os.urandom(2 << 20)
        r = await c.ask("POST", "/sum", body)
        seen = json.loads(r["body"])
        check("large POST", (seen["length"], seen["sha256"]) == (len(body), hashlib.sha256(body).hexdigest()), seen)
        r = await c.ask("POST", "/echo", body)
        check("large answer", r["body"] == body, len(r["body"]))
        r = await c.ask("POST", "/sum", b"abc", trailers=[("x-t", "1")])
        check("trailers up", json.loads(r["body"])["trailers"] == {"x-t": "1"}, r)
        r = await c.ask("GET", "/trailers", headers=[("te", "trailers")])
        check("trailers down", (r["body"], r["trailers"]) == (b"body", {"x-sum": "42"}), r)

        begun = time.monotonic()
        all = await asyncio.gather(*(c.ask("POST", "/sum", bytes([i % 256]) * 5000) for i in range(200)),
                                   *(c.ask("GET", "/slow") for _ in range(50)))
        check("250 streams", all and {s["head"][":status"] for s in all} == {"200"})
        check("none waits for another", time.monotonic() - begun < 15, time.monotonic() - begun)

        r = await c.ask("GET", "/", headers=[(f"x-{i}", "v" * 1000) for i in range(80)])
        check("431 beyond 60 KiB", r["head"] and r["head"][":status"] == "431", r)
        for name, extra in [("two paths", [(":path", "/other")]), ("a field before", []), ("two authorities", [(":authority", "b.example")])]:
            pre = [("x", "1"), (":path", "/")] if name == "a field before" else extra
            sid = c.open("GET", "/", pseudo=pre)
            await c.until(lambda: c.stream(sid)["end"])
            check(f"{name}: 400", c.stream(sid)["head"][":status"] == "400", c.stream(sid))
        sid = c.open("POST", "/sum", headers=[("content-length", "5")], ended=False)
        c.http.send_data(sid, b"abc", end_stream=True)
        c.transmit()
        await c.until(lambda: c.stream(sid)["end"])
        s = c.stream(sid)
        check("a length that is not kept", s["reset"] is not None or s["head"][":status"] == "400", s)

        sid = c.open("CONNECT", "/ws", pseudo=[(":protocol", "websocket")], headers=[("sec-websocket-version", "13")], ended=False)
        await c.until(lambda: c.stream(sid)["head"])
        check("a WebSocket is accepted", c.stream(sid)["head"][":status"] == "200", c.stream(sid))
        c.http.send_data(sid, b"hello", end_stream=False)
        c.transmit()
        await c.until(lambda: c.stream(sid)["body"] == b"echo hello")
        c.http.send_data(sid, b"", end_stream=True)
        c.transmit()
        await c.until(lambda: c.stream(sid)["end"])
        check("and carries bytes", True)
        sid = c.open("CONNECT", "/x", pseudo=[(":protocol", "connect-udp")], ended=False)
        await c.until(lambda: c.stream(sid)["end"] or c.stream(sid)["head"])
        check("another protocol is not", c.stream(sid)["head"][":status"] == "403", c.stream(sid))
        r = await c.ask("GET", "/after")
        check("the connection lives", r["head"][":status"] == "200", r)

        # What ends the connection: a reserved frame of HTTP/2.
        sid = c._quic.get_next_available_stream_id()
        c._quic.send_stream_data(sid, bytes([0x06, 0x00]), True)
        c.transmit()
        while not c.end:
            c.wake.clear()
            await asyncio.wait_for(c.wake.wait(), 10)
        check("H3_FRAME_UNEXPECTED", c.end.error_code == 0x105, c.end)

    check("wrong server name", await refused("other.example") is not None)
    check("no client certificate", await refused("staff.example") is not None)
    async with dial("staff.example", cert=True) as c:
        sid = c._quic.get_next_available_stream_id()
        c.http.send_headers(sid, [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"staff.example"), (b":path", b"/")], end_stream=True)
        c.transmit()
        await c.until(lambda: c.stream(sid)["end"])
        f = json.loads(c.stream(sid)["body"])["fields"]
        check("a client certificate is told", "Hash=" in f.get("x-forwarded-client-cert", ""), f)

    # The gateway stops: what runs is answered, what comes later is refused, then it closes.
    async with dial() as c:
        await c.ask("GET", "/")
        slow = asyncio.ensure_future(c.ask("GET", "/slow"))
        await asyncio.sleep(0.2)
        os.kill(PID, signal.SIGTERM)
        await c.until(lambda: c.goaway)
        check("the end is announced", c.goaway[0] == (1 << 62) - 4, c.goaway)
        r = await c.ask("GET", "/meanwhile")
        check("and nothing refused yet", r["head"][":status"] == "200", r)
        await c.until(lambda: len(c.goaway) > 1)
        check("then the first that is refused", c.goaway[1] == 12, c.goaway)
        late = c.open("GET", "/late")
        await c.until(lambda: c.stream(late)["end"])
        check("H3_REQUEST_REJECTED", c.stream(late)["reset"] == 0x10b, c.stream(late))
        r = await slow
        check("what ran is answered", r["head"][":status"] == "200", r)
        while not c.end:
            c.wake.clear()
            await asyncio.wait_for(c.wake.wait(), 10)
        check("H3_NO_ERROR", c.end.error_code == 0x100, c.end)


asyncio.run(asyncio.wait_for(main(), 240))
