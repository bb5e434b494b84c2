#!/bin/sh
# Drives the HTTP API of bin/im-dev by the OpenAPI document that it serves, with schemathesis, which is
# installed into .cache at the version pinned here; `run.sh install` does that alone. Takes half a minute; the
# same cases each time.
set -eu
cd "$(dirname "$0")/../.."
version=4.32.5
venv=.cache/schemathesis-$version
if [ ! -x "$venv/bin/schemathesis" ]; then
	rm -rf "$venv"
	python3 -m venv "$venv"
	"$venv/bin/pip" install -q --disable-pip-version-check "schemathesis==$version"
fi
[ "${1:-}" != install ] || exit 0
work=$(mktemp -d)
bin/im-dev -http 127.0.0.1:0 -page 127.0.0.1:0 -admin 127.0.0.1:0 -grpc 127.0.0.1:0 >"$work/log" 2>&1 &
dev=$!
finish() {
	status=$?
	kill "$dev" 2>/dev/null && wait "$dev" || true
	[ "$status" -eq 0 ] || grep -E "\"level\":\"(warn|error)\"" "$work/log" | tail -n 20 || true
	rm -rf "$work"
	exit "$status"
}
trap finish EXIT
i=0
until addr=$(sed -n 's/.*"http_addr":"\([^"]*\)".*"ready".*/\1/p' "$work/log") && [ -n "$addr" ]; do
	i=$((i + 1))
	[ "$i" -le 300 ] && kill -0 "$dev" || { echo "im-dev did not become ready" >&2; exit 1; }
	sleep 0.1
done
token=$("$venv/bin/python" -c '
import json, sys, urllib.request
body = json.dumps({"username": "alice", "password": "alice-demo"}).encode()
print(json.load(urllib.request.urlopen("http://" + sys.argv[1] + "/api/auth/login", body))["data"]["token"])' "$addr")
timeout 120 "$venv/bin/schemathesis" --no-color --config-file test/schema/schemathesis.toml run "http://$addr/openapi.json" \
	-H "Authorization: Bearer $token" --generation-deterministic \
	--max-examples 150 --workers 1
