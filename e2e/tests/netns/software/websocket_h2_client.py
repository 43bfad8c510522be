"""WebSocket over HTTP/2, by extended CONNECT (RFC 8441), with the PyPI packages h2 and websockets."""

import socket
import sys

import h2.config
import h2.connection
import h2.events
import h2.settings
from websockets.frames import Frame, Opcode, Close
from websockets.extensions.base import Extension  # noqa: F401
from websockets.streams import StreamReader

host, port = sys.argv[1], int(sys.argv[2])
s = socket.create_connection((host, port), 10)
c = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
c.initiate_connection()
s.sendall(c.data_to_send())
data, status, ended = StreamReader(), None, False


def turn():
    global status, ended
    for e in c.receive_data(s.recv(65536)):
        if isinstance(e, h2.events.ResponseReceived):
            status = dict(e.headers)[":status"]
        elif isinstance(e, h2.events.DataReceived):
            c.acknowledge_received_data(e.flow_controlled_length, e.stream_id)
            data.feed_data(e.data)
        elif isinstance(e, (h2.events.StreamEnded, h2.events.StreamReset)):
            ended = True
    s.sendall(c.data_to_send())


while not c.remote_settings.get(h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL):
    turn()
c.send_headers(1, [
    (":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", "/"),
    (":authority", f"{host}:{port}"), ("sec-websocket-version", "13"),
])
s.sendall(c.data_to_send())
while status is None:
    turn()
assert status == "200", status


def send(opcode, payload, fin=True):
    c.send_data(1, Frame(opcode, payload, fin=fin).serialize(mask=True))
    s.sendall(c.data_to_send())


def receive():
    parser = Frame.parse(data.read_exact, mask=False, max_size=None)
    while True:
        try:
            next(parser)
        except StopIteration as done:
            return done.value
        turn()


for i in range(100):
    send(Opcode.TEXT, b"text %d" % i)
    f = receive()
    assert (f.opcode, f.data) == (Opcode.TEXT, b"text %d" % i), f
for i in range(3):
    send(Opcode.TEXT if i == 0 else Opcode.CONT, b"part %d;" % i, fin=i == 2)
assert receive().data == b"part 0;part 1;part 2;"
send(Opcode.PING, b"p")
f = receive()
assert (f.opcode, f.data) == (Opcode.PONG, b"p"), f
send(Opcode.TEXT, b"close 4321")
f = receive()
assert f.opcode == Opcode.CLOSE and Close.parse(f.data).code == 4321, f
send(Opcode.CLOSE, f.data)
while not ended:
    turn()
print("extended CONNECT: 100 messages, fragments, ping, close code, end of stream")
