package engine

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
)

// Set by the linker in releases and images (scripts/build.sh); empty in what the go command builds alone.
var version, commit, date string

// Build says what this binary was made of.
type Build struct {
	Version string // such as v1.2.3; "(devel)" when nothing names it
	Commit  string // empty when unknown
	Date    string // of the commit, RFC 3339; empty when unknown
	Go      string // such as go1.26.8 linux/amd64
}

// BuildInfo is what the linker was told, else what the go command has stamped.
func BuildInfo() Build {
	b := Build{
		Version: version, Commit: commit, Date: date,
		Go: fmt.Sprintf("%s %s/%s", runtime.Version(), runtime.GOOS, runtime.GOARCH),
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		b.stamped(info)
	}
	b.Version = cmp.Or(b.Version, "unknown")
	return b
}

// stamped fills in what is still empty.
func (b *Build) stamped(info *debug.BuildInfo) {
	b.Version = cmp.Or(b.Version, info.Main.Version)
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = cmp.Or(b.Commit, s.Value)
		case "vcs.time":
			b.Date = cmp.Or(b.Date, s.Value)
		}
	}
}

// String is one line: v1.2.3, commit 8d482c9..., 2026-01-02T15:04:05Z, go1.26.8 linux/amd64.
func (b Build) String() string {
	if b.Commit == "" {
		return b.Version + ", " + b.Go
	}
	return fmt.Sprintf("%s, commit %s, %s, %s", b.Version, b.Commit, b.Date, b.Go)
}

// Version is the version alone.
func Version() string { return BuildInfo().Version }
