package engine

import (
	"runtime/debug"
	"testing"
)

func TestBuildInfo(t *testing.T) {
	stamps := &debug.BuildInfo{Main: debug.Module{Version: "v0.0.1"}, Settings: []debug.BuildSetting{
		{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.time", Value: "2026-01-02T03:04:05Z"}, {Key: "GOOS", Value: "linux"},
	}}
	for _, tc := range []struct {
		name  string
		build Build
		info  *debug.BuildInfo
		want  string
	}{
		{"linked", Build{"v1.2.3", "def", "2026-05-06T07:08:09Z", "go1"}, stamps, "v1.2.3, commit def, 2026-05-06T07:08:09Z, go1"},
		{"stamped", Build{Go: "go1"}, stamps, "v0.0.1, commit abc, 2026-01-02T03:04:05Z, go1"},
		{"neither", Build{Go: "go1"}, &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "(devel), go1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := tc.build
			if b.stamped(tc.info); b.String() != tc.want {
				t.Errorf("%s, want %s", b, tc.want)
			}
		})
	}
	if Version() == "" {
		t.Error("no version")
	}
}
