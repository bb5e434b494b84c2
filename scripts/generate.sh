#!/bin/sh
# Generates the Go code of the protobuf files into OUT (the tree itself unless given): protoc from
# Debian (protobuf-compiler), the plugins at the versions that go.mod pins.
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
command -v protoc >/dev/null || { echo "protoc is missing: apt-get install protobuf-compiler" >&2; exit 1; }
bin=$PWD/.cache/bin
mkdir -p "$bin" "$out"
go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
PATH="$bin:$PATH" protoc -I codec/proto \
	--go_out="$out" --go_opt=module=im-gateway \
	--go-grpc_out="$out" --go-grpc_opt=module=im-gateway \
	im/client/v1/client.proto im/logic/v1/auth.proto im/gateway/v1/gateway.proto im/gateway/v1/admin.proto
