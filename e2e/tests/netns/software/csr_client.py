"""A node agent of Istio 1.0 as grpcio has it: csr_client.py ADDRESS NAME ROOT CHAIN KEY CSR, which prints what it is told.

CHAIN and KEY are its certificate, `-` for none. The messages are described here, as there is no protoc."""

import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def message(name, *fields):
    m = descriptor_pb2.DescriptorProto(name=name)
    for number, field, kind, of in fields:
        m.field.add(name=field, number=number, type=kind, type_name=of or None, label=1)
    return m


BYTES, STRING, INT32, BOOL, MESSAGE = 12, 9, 5, 8, 11
pool = descriptor_pool.DescriptorPool()
pool.Add(
    descriptor_pb2.FileDescriptorProto(
        name="ca.proto",
        package="istio.v1.auth",
        syntax="proto3",
        message_type=[
            message(
                "CsrRequest",
                (1, "csr_pem", BYTES, ""),
                (2, "node_agent_credential", BYTES, ""),
                (3, "credential_type", STRING, ""),
                (4, "requested_ttl_minutes", INT32, ""),
            ),
            message("Status", (1, "code", INT32, ""), (2, "message", STRING, "")),
            message(
                "CsrResponse",
                (1, "is_approved", BOOL, ""),
                (2, "status", MESSAGE, ".istio.v1.auth.Status"),
                (3, "signed_cert", BYTES, ""),
                (4, "cert_chain", BYTES, ""),
            ),
        ],
    )
)


def of(name):
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("istio.v1.auth." + name))


def read(path):
    if path == "-":
        return None
    with open(path, "rb") as f:
        return f.read()


if __name__ == "__main__":
    address, name, root, chain, key, csr = sys.argv[1:]
    credentials = grpc.ssl_channel_credentials(read(root), read(key), read(chain))
    with grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)]) as channel:
        call = channel.unary_unary(
            "/istio.v1.auth.IstioCAService/HandleCSR",
            request_serializer=of("CsrRequest").SerializeToString,
            response_deserializer=of("CsrResponse").FromString,
        )
        try:
            said = call(of("CsrRequest")(csr_pem=read(csr), requested_ttl_minutes=60), timeout=10)
        except grpc.RpcError as e:
            print(e.code().name, e.details())
            sys.exit(0)
    print("approved" if said.is_approved and said.status.code == 0 else "not approved")
    print((said.signed_cert + said.cert_chain).decode())
