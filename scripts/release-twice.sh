#!/usr/bin/env bash
# Shows that a release can be made again: builds it from two clones in different places, the second one with
# an empty build cache, and compares the checksums. Takes the platforms that scripts/release.sh takes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q . "$work/one"
git clone -q . "$work/a/longer/path/two"
"$work/one/scripts/release.sh" "$@"
GOCACHE=$work/cache "$work/a/longer/path/two/scripts/release.sh" "$@" >/dev/null
cmp "$work/one/dist/SHA256SUMS" "$work/a/longer/path/two/dist/SHA256SUMS"
echo "both builds are the same"
