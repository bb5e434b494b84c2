package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const credentials = "/run/credentials/im-gateway.service"

// TestSystemd: systemd finds nothing wrong with the unit, its exposure is low, and it agrees with the
// configuration beside it.
func TestSystemd(t *testing.T) {
	unit := read(t, root+"/deploy/systemd/im-gateway.service")
	file := filepath.Join(t.TempDir(), "im-gateway.service")
	write(t, file, []byte(strings.ReplaceAll(unit, "/usr/local/bin/im-gateway", filepath.Join(bin, "im-gateway"))))
	for _, args := range [][]string{{"verify", "--man=no", file}, {"security", "--offline=true", "--threshold=20", file}} {
		out, err := exec.Command("systemd-analyze", args...).CombinedOutput()
		if err != nil || args[0] == "verify" && len(out) > 0 {
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
	conf := read(t, root+"/deploy/systemd/gateway.yaml")
	c := load(t, conf, nil, credentials)
	if stop := (config{"TimeoutStopSec": value(t, unit, "TimeoutStopSec")}).duration(t, "TimeoutStopSec"); stop <= c.duration(t, "drain.deadline") {
		t.Errorf("it is killed after %v, a drain may take %v", stop, c["drain.deadline"])
	}
	for _, m := range regexp.MustCompile(regexp.QuoteMeta(credentials)+`/([a-z-]+)`).FindAllStringSubmatch(conf, -1) {
		if !strings.Contains(unit, "\nLoadCredential="+m[1]+":") {
			t.Errorf("the unit does not load %s", m[1])
		}
	}
	// Exit code 2 is a wrong configuration (README.md).
	if value(t, unit, "RestartPreventExitStatus") != "2" {
		t.Error("a wrong configuration is started again and again")
	}
}

// value is that of a key of a unit.
func value(t *testing.T, unit, key string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindStringSubmatch(unit)
	if m == nil {
		t.Fatalf("the unit has no %s", key)
	}
	return m[1]
}

// TestSysctl: this kernel knows every name, but those that a line marks as not everywhere.
func TestSysctl(t *testing.T) {
	for line := range strings.Lines(read(t, root+"/deploy/systemd/sysctl.conf")) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		m := regexp.MustCompile(`^(-?)([a-z0-9_.-]+) = [0-9 ]+$`).FindStringSubmatch(line)
		if m == nil {
			t.Errorf("cannot be read: %s", line)
			continue
		}
		if _, err := os.Stat("/proc/sys/" + strings.ReplaceAll(m[2], ".", "/")); err != nil && m[1] == "" {
			t.Error(err)
		}
	}
}
