package deploy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestRelease makes the release of the last commit for this platform: checksums, the archive, what the program
// says of itself, the bill of materials. That all of it can be made again to the byte: make release-check.
func TestRelease(t *testing.T) {
	clone := filepath.Join(t.TempDir(), "clone")
	run := func(dir, name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v\n%s%s", name, err, out.Bytes(), errs.Bytes())
		}
		return strings.TrimSpace(out.String())
	}
	run(root, "git", "clone", "-q", ".", clone)
	commit := run(clone, "git", "rev-parse", "HEAD")
	run(clone, "git", "tag", "v1.2.3")
	run(clone, "scripts/release.sh", runtime.GOOS+"/"+runtime.GOARCH)
	dist := filepath.Join(clone, "dist")
	if out := run(dist, "sha256sum", "--check", "SHA256SUMS"); strings.Count(out, ": OK") != 2 {
		t.Errorf("checksums: %s", out)
	}
	name := "im-gateway-v1.2.3-" + runtime.GOOS + "-" + runtime.GOARCH
	files := unpack(t, filepath.Join(dist, name+".tar.gz"))
	for _, want := range []string{"README.md", "docs/configuration.md", "deploy/systemd/im-gateway.service"} {
		if len(files[name+"/"+want]) == 0 {
			t.Errorf("the archive has no %s", want)
		}
	}
	program := filepath.Join(t.TempDir(), "im-gateway")
	write(t, program, files[name+"/im-gateway"])
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	if out := run(".", program, "-version"); !strings.HasPrefix(out, "im-gateway v1.2.3, commit "+commit+", 20") {
		t.Errorf("version: %s", out)
	}
	var bill struct {
		BOMFormat string
		Metadata  struct {
			Component struct{ Name, Version string }
		}
		Components []struct{ Name, Version string }
	}
	if err := json.Unmarshal([]byte(read(t, filepath.Join(dist, name+".cdx.json"))), &bill); err != nil {
		t.Fatal(err)
	}
	parts := map[string]string{}
	for _, c := range bill.Components {
		parts[c.Name] = c.Version
	}
	if main := bill.Metadata.Component; bill.BOMFormat != "CycloneDX" || main.Name != "im-gateway" || main.Version != "v1.2.3" {
		t.Errorf("a bill for %+v", bill.Metadata)
	}
	for _, module := range []string{"std", "github.com/IBM/sarama", "github.com/panjf2000/gnet/v2"} {
		if parts[module] == "" {
			t.Errorf("the bill does not name %s", module)
		}
	}
	if parts["github.com/alicebob/miniredis/v2"] != "" {
		t.Error("the bill names what the gateway does not link")
	}
}

// unpack returns the files of an archive, which all must be root's.
func unpack(t *testing.T, name string) map[string][]byte {
	t.Helper()
	zipped, err := gzip.NewReader(strings.NewReader(read(t, name)))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for archive := tar.NewReader(zipped); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s belongs to %d:%d %s", h.Name, h.Uid, h.Gid, h.Uname)
		}
		if files[h.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
}
