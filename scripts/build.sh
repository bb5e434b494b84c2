#!/bin/sh
# Builds im-gateway as releases and images carry it: static, without paths of this machine, the same bytes
# from the same commit wherever it is built.
# Usage: VERSION=v1.2.3 COMMIT=HASH DATE=RFC3339 [GOOS=linux GOARCH=amd64] scripts/build.sh FILE
set -eu
cd "$(dirname "$0")/.."
out=${1:?the file to write}
: "${VERSION:?}" "${COMMIT:?}" "${DATE:?}"
set -- -s -w -buildid= \
	-X "im-gateway/engine.version=$VERSION" -X "im-gateway/engine.commit=$COMMIT" -X "im-gateway/engine.date=$DATE"
CGO_ENABLED=0 exec ${GO:-go} build -trimpath -buildvcs=false -ldflags "$*" -o "$out" ./cmd/im-gateway
