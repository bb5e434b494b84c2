#!/usr/bin/env bash
# Builds a release of the commit that is checked out into dist/: for each platform an archive with the
# gateway, its documents and deploy/, and a bill of materials (CycloneDX); then SHA256SUMS. The same commit
# makes the same bytes with the same Go version: scripts/release-twice.sh shows it.
# Usage: scripts/release.sh [PLATFORM...], such as linux/amd64; needs GNU tar and, once, the network.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -z $(git status --porcelain) ]] || { echo "release: commit or remove what git status shows first" >&2; exit 1; }
(($#)) || set -- linux/amd64 linux/arm64 darwin/amd64 darwin/arm64
export GO=${GO:-go} VERSION=${VERSION:-$(git describe --tags --always)} COMMIT DATE
COMMIT=$(git rev-parse HEAD)
seconds=$(git log -1 --format=%ct)
DATE=$(date -u -d "@$seconds" +%Y-%m-%dT%H:%M:%SZ)
dist=$PWD/dist
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

# A clone holds what git has, and nothing that lies about.
git clone -q . "$stage/src"
cd "$stage/src"
GOBIN=$stage/bin GOFLAGS='' CGO_ENABLED=0 "$GO" install -trimpath \
	github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.9.0
rm -rf "$dist"
mkdir "$dist"
for platform; do
	export GOOS=${platform%/*} GOARCH=${platform#*/}
	name=im-gateway-$VERSION-$GOOS-$GOARCH
	scripts/build.sh "$stage/$name/im-gateway"
	git archive HEAD README.md CHANGELOG.md ARCHITECTURE.md docs deploy | tar -x -C "$stage/$name"
	tar -C "$stage" --sort=name --format=ustar --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
		--mtime="@$seconds" -c "$name" | gzip -9n >"$dist/$name.tar.gz"
	# Its time of making is the commit's, so that nothing of today is in it.
	CGO_ENABLED=0 "$stage/bin/cyclonedx-gomod" app -json -std -licenses -noserial -main cmd/im-gateway . 2>"$stage/log" |
		sed -E "s/(\"timestamp\": *)\"[^\"]*\"/\1\"$DATE\"/" >"$dist/$name.cdx.json" || { cat "$stage/log" >&2; exit 1; }
done
cd "$dist"
sha256sum -- *.tar.gz *.cdx.json >SHA256SUMS
cat SHA256SUMS
