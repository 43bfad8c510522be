"""grpcio's client, which does what lines of JSON tell it and answers with a line each: client.py TARGET [mtls | AUTHORITY].

- {"calls": N, "method": M, "metadata": {...}, "timeout": S, "parallel": P}: makes N calls; answers how many ended with
  which status, how many each server answered, how long all took, and what the last error said
- {"begin": {...the same but N}}: calls on and on until
- {"end": true}, which answers for all of those
"""

import collections
import json
import os
import sys
import threading
import time
from concurrent import futures

import grpc
import grpc.experimental

target = sys.argv[1]
options = [("grpc.enable_http_proxy", 0)]
if sys.argv[2:] == ["mtls"]:
    # What xDS says of the cluster; in clear where it says nothing.
    credentials = grpc.xds_channel_credentials(grpc.experimental.insecure_channel_credentials())
    channel = grpc.secure_channel(target, credentials, options=options)
else:
    if sys.argv[2:]:
        options.append(("grpc.default_authority", sys.argv[2]))
    channel = grpc.insecure_channel(target, options=options)


class Tally:
    def __init__(self):
        self.codes = collections.Counter()
        self.served = collections.Counter()
        self.error = ""
        self.lock = threading.Lock()
        self.begun = time.time()

    def call(self, order):
        method = channel.unary_unary("/greeter.Greeter/" + order.get("method", "Hello"))
        metadata = list(order.get("metadata", {}).items())
        try:
            answer = method(b"", timeout=order.get("timeout", 10), metadata=metadata).decode()
            with self.lock:
                self.codes["OK"] += 1
                self.served[answer.strip()] += 1
        except grpc.RpcError as e:
            with self.lock:
                self.codes[e.code().name] += 1
                self.error = e.details()

    def answer(self):
        said = {
            "codes": self.codes,
            "served": self.served,
            "error": self.error,
            "seconds": time.time() - self.begun,
        }
        print(json.dumps(said), flush=True)


def load(tally, order, stop):
    while not stop.is_set():
        tally.call(order)
        time.sleep(0.001)


running = None
print("{}", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "calls" in order:
        tally = Tally()
        with futures.ThreadPoolExecutor(order.get("parallel", 1)) as pool:
            for f in [pool.submit(tally.call, order) for _ in range(order["calls"])]:
                f.result()
        tally.answer()
    elif "begin" in order:
        stop, tally = threading.Event(), Tally()
        threads = [threading.Thread(target=load, args=(tally, order["begin"], stop)) for _ in range(4)]
        for t in threads:
            t.start()
        running = (stop, tally, threads)
        print("{}", flush=True)
    elif "end" in order:
        stop, tally, threads = running
        stop.set()
        for t in threads:
            t.join()
        tally.answer()
os._exit(0)
