// Package deploy checks what deploy/ ships, on a machine without Docker, Kubernetes or a systemd that runs: each
// file by the code that reads it there or by its linter, every configuration by the gateway itself, the image
// by doing what the Dockerfile says. It is a module of its own: nothing of this is linked into the gateway.
package deploy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// root is the repository.
const root = "../.."

// bin holds im-gateway and im-dev, as `make build` makes them.
var bin string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "im-deploy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	cmd := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "./cmd/im-gateway", "./cmd/im-dev")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		return 1
	}
	bin = dir
	return m.Run()
}

// config is an effective configuration by its keys.
type config map[string]any

// duration reads a key that must be there.
func (c config) duration(t *testing.T, key string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(fmt.Sprint(c[key]))
	if err != nil {
		t.Fatalf("%s: %v", key, err)
	}
	return d
}

// load has the gateway check a configuration, and returns it. Files that it names in secretDirs are looked for
// in a directory that has them.
func load(t *testing.T, file string, environ map[string]string, secretDirs ...string) config {
	t.Helper()
	secrets := t.TempDir()
	for _, name := range []string{"jwt-secret", "grpc-token"} {
		write(t, filepath.Join(secrets, name), []byte(strings.Repeat("0123456789abcdef", 4)))
	}
	var replace []string
	for _, dir := range secretDirs {
		replace = append(replace, dir+"/", secrets+"/")
	}
	here := strings.NewReplacer(replace...)
	var env []string
	for k, v := range environ {
		env = append(env, k+"="+here.Replace(v))
	}
	call := func(verb string) []byte {
		cmd := exec.Command(filepath.Join(bin, "im-gateway"), "config", verb)
		if file != "" {
			name := filepath.Join(t.TempDir(), "gateway.yaml")
			write(t, name, []byte(here.Replace(file)))
			cmd.Args = append(cmd.Args, "-config", name)
		}
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("config %s: %v\n%s", verb, err, out)
		}
		return out
	}
	call("check")
	c := config{}
	if err := yaml.Unmarshal(call("print"), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}
