package deploy

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDockerfile lints it with hadolint, which `make test-deploy` installs.
func TestDockerfile(t *testing.T) {
	if out, err := exec.Command("hadolint", root+"/deploy/Dockerfile").CombinedOutput(); err != nil {
		t.Errorf("%v (make test-deploy installs hadolint)\n%s", err, out)
	}
}

// stage is one stage of a Dockerfile that was carried out: a directory that stands for its root.
type stage struct {
	dir, work  string
	user       string
	entrypoint string
	args       map[string]string
}

// image does what the Dockerfile says, in directories: COPY copies, RUN runs with the Go and the shell of this
// machine in place of the base image's. It returns the last stage. Stages of a name in without are left out.
func image(t *testing.T, args map[string]string, without ...string) *stage {
	t.Helper()
	stages := map[string]*stage{}
	var at *stage // nil: one that is left out
	for line := range strings.Lines(strings.ReplaceAll(read(t, root+"/deploy/Dockerfile"), "\\\n", " ")) {
		words := strings.Fields(line)
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		if at == nil && words[0] != "FROM" {
			continue
		}
		switch words[0] {
		case "FROM":
			words = slices.DeleteFunc(words[1:], func(w string) bool { return strings.HasPrefix(w, "--") })
			if at = nil; slices.Contains(without, words[len(words)-1]) {
				continue
			}
			at = &stage{dir: t.TempDir(), work: "/", args: map[string]string{}}
			if from := stages[words[0]]; from != nil {
				at.dir, at.work, at.args = from.dir, from.work, from.args
			} else if words[0] != "scratch" {
				// What a stage takes from its base image is this machine's.
				write(t, at.dir+"/etc/ssl/certs/ca-certificates.crt", []byte(read(t, "/etc/ssl/certs/ca-certificates.crt")))
			}
			if len(words) == 3 {
				stages[words[2]] = at
			}
		case "WORKDIR":
			at.work = words[1]
		case "ARG":
			for _, w := range words[1:] {
				name, value, _ := strings.Cut(w, "=")
				if given, ok := args[name]; ok {
					value = given
				}
				at.args[name] = value
			}
		case "COPY":
			at.copy(t, words[1:], stages)
		case "RUN":
			at.run(t, strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "RUN")))
		case "USER":
			at.user = words[1]
		case "ENTRYPOINT":
			at.entrypoint = strings.Trim(words[1], `["]`)
		case "EXPOSE":
		default:
			t.Fatalf("this test cannot do %s", words[0])
		}
	}
	return at
}

func (s *stage) copy(t *testing.T, words []string, stages map[string]*stage) {
	t.Helper()
	from := ""
	if name, ok := strings.CutPrefix(words[0], "--from="); ok {
		from, words = stages[name].dir, words[1:]
	}
	to := words[len(words)-1]
	for _, source := range words[:len(words)-1] {
		if source == "." {
			s.copyContext(t)
			continue
		}
		target := to
		if strings.HasSuffix(to, "/") {
			target = path.Join(to, path.Base(source))
		}
		if !path.IsAbs(target) {
			target = path.Join(s.work, target)
		}
		if from == "" {
			source = filepath.Join(root, source)
		} else {
			source = from + source
		}
		info, err := os.Stat(source)
		if err != nil {
			t.Fatal(err)
		}
		write(t, s.dir+target, []byte(read(t, source)))
		if err := os.Chmod(s.dir+target, info.Mode()); err != nil {
			t.Fatal(err)
		}
	}
}

// copyContext copies what git has, less what .dockerignore names, as a build from a clone does.
func (s *stage) copyContext(t *testing.T) {
	t.Helper()
	var ignored []string
	for line := range strings.Lines(read(t, root+"/.dockerignore")) {
		ignored = append(ignored, strings.TrimSpace(line))
	}
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(out), "\x00"), "\x00") {
		if !slices.ContainsFunc(ignored, func(p string) bool { return ignores(p, name) }) {
			s.copy(t, []string{name, "./" + name}, nil)
		}
	}
}

// ignores tells whether a pattern of .dockerignore, a folder or **/name, means a file.
func ignores(pattern, name string) bool {
	base, anywhere := strings.CutPrefix(pattern, "**/")
	for part := name; part != "."; part = path.Dir(part) {
		if anywhere {
			if ok, _ := path.Match(base, path.Base(part)); ok {
				return true
			}
		} else if part == pattern {
			return true
		}
	}
	return false
}

func (s *stage) run(t *testing.T, command string) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", strings.ReplaceAll(command, " /out/", " "+s.dir+"/out/"))
	cmd.Dir, cmd.Env = s.dir+s.work, os.Environ()
	for k, v := range s.args {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("RUN %s: %v\n%s", command, err, out)
	}
}

// TestImage makes the image and runs it as compose.yaml does: as its user, without capabilities, in a root that
// has only its files and what Docker adds, against Kafka, etcd, Redis and im-logic of im-dev. Needs root.
func TestImage(t *testing.T) {
	args := map[string]string{
		"TARGETOS": runtime.GOOS, "TARGETARCH": runtime.GOARCH,
		"VERSION": "v0.0.0-image", "COMMIT": "0123abc", "DATE": "2026-01-02T03:04:05Z",
	}
	img := image(t, args)
	var files []string
	err := filepath.WalkDir(img.dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, strings.TrimPrefix(name, img.dir))
		}
		return err
	})
	if err != nil || !slices.Equal(files, []string{"/etc/ssl/certs/ca-certificates.crt", "/im-gateway"}) {
		t.Fatalf("the image holds %v: %v", files, err)
	}
	program, err := elf.Open(img.dir + img.entrypoint)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = program.Close() }()
	if slices.ContainsFunc(program.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		t.Error("the program is not static")
	}
	t.Run("same bytes from elsewhere", func(t *testing.T) {
		if again := image(t, args, "build-im-dev", "im-dev"); read(t, again.dir+again.entrypoint) != read(t, img.dir+img.entrypoint) {
			t.Error("the same source made another program")
		}
	})
	out, err := exec.Command(img.dir+img.entrypoint, "-version").Output()
	want := fmt.Sprintf("im-gateway v0.0.0-image, commit 0123abc, 2026-01-02T03:04:05Z, %s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	if string(out) != want || err != nil {
		t.Errorf("version %q, want %q: %v", out, want, err)
	}
	img.serves(t)
}

// serves runs the image until it is ready, and has it drain.
func (s *stage) serves(t *testing.T) {
	dev := backends(t)
	service := project(t).Services["im-gateway-0"]
	env := gatewayEnviron(service)
	public, admin := freeAddr(t), freeAddr(t)
	env["IM_HTTP_ADDR"], env["IM_ADMIN_ADDR"], env["IM_GRPC_ADDR"] = public, admin, freeAddr(t)
	env["IM_KAFKA_BROKERS"], env["IM_REDIS_ADDRS"], env["IM_ETCD_ENDPOINTS"] = dev.kafka, dev.redis, dev.etcd
	for _, secret := range service.Secrets {
		write(t, s.dir+"/run/secrets/"+secret.Source, []byte(strings.Repeat("0123456789abcdef", 4)))
	}
	// What Docker lays into each container.
	write(t, s.dir+"/etc/hosts", []byte("127.0.0.1 localhost\n"))
	write(t, s.dir+"/etc/resolv.conf", nil)
	write(t, s.dir+"/dev/null", nil)
	mount(t, "/dev/null", s.dir+"/dev/null", "", syscall.MS_BIND)
	if err := os.Mkdir(s.dir+"/proc", 0o555); err != nil {
		t.Fatal(err)
	}
	mount(t, "proc", s.dir+"/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC)

	var uid, gid uint32
	if _, err := fmt.Sscanf(s.user, "%d:%d", &uid, &gid); err != nil || uid == 0 || gid == 0 {
		t.Fatalf("user %s: %v", s.user, err)
	}
	var log bytes.Buffer
	cmd := &exec.Cmd{Path: s.entrypoint, Args: []string{s.entrypoint}, Dir: "/", Env: []string{}, Stdout: &log, Stderr: &log}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot: s.dir, Credential: &syscall.Credential{Uid: uid, Gid: gid}, Pdeathsig: syscall.SIGKILL,
	}
	wait := start(t, cmd)
	eventually(t, "the gateway is ready", func() bool { return status("http://"+admin+"/readyz") == http.StatusOK })
	if got := status("http://" + public + "/healthz"); got != http.StatusOK {
		t.Errorf("the public port answers %d", got)
	}
	check := exec.Command(service.HealthCheck.Test[1], service.HealthCheck.Test[2:]...)
	check.Env, check.Dir, check.SysProcAttr = cmd.Env, "/", &syscall.SysProcAttr{Chroot: s.dir, Credential: cmd.SysProcAttr.Credential}
	if out, err := check.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("im-gateway-0")) {
		t.Errorf("health check: %v\n%s", err, out)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := wait(time.Duration(*service.StopGracePeriod)); err != nil {
		t.Errorf("stop: %v\n%s", err, log.Bytes())
	}
}

// servers are those of an im-dev, with its im-logic.
type servers struct{ kafka, etcd, redis string }

func backends(t *testing.T) servers {
	t.Helper()
	s := servers{freeAddr(t), freeAddr(t), freeAddr(t)}
	admin := freeAddr(t)
	port := func(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }
	cmd := exec.Command(filepath.Join(bin, "im-dev"), "-http", "127.0.0.1:0", "-page", "127.0.0.1:0", "-grpc", "127.0.0.1:0",
		"-admin", admin, "-kafka-port", port(s.kafka), "-etcd-port", port(s.etcd), "-redis-port", port(s.redis))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	wait := start(t, cmd)
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := wait(time.Minute); err != nil {
			t.Errorf("im-dev: %v", err)
		}
	})
	eventually(t, "im-dev is ready", func() bool { return status("http://"+admin+"/readyz") == http.StatusOK })
	return s
}

// start starts a command, which is killed when the test ends; wait waits for it.
func start(t *testing.T, cmd *exec.Cmd) (wait func(time.Duration) error) {
	t.Helper()
	started, done := make(chan error, 1), make(chan struct{})
	var ended error
	go func() {
		defer close(done)
		runtime.LockOSThread() // Pdeathsig is tied to the thread that starts the process
		err := cmd.Start()
		started <- err
		if err == nil {
			ended = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("%v (needs root)", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-done
	})
	return func(patience time.Duration) error {
		select {
		case <-done:
			return ended
		case <-time.After(patience):
			return errors.New("it does not end")
		}
	}
}

func mount(t *testing.T, source, target, kind string, flags uintptr) {
	t.Helper()
	if err := syscall.Mount(source, target, kind, flags, ""); err != nil {
		t.Fatalf("mount %s: %v (needs root)", target, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", target, err)
		}
	})
}

func status(url string) int {
	resp, err := http.Get(url)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// freeAddr finds an address that nobody listens on, below the ports of outgoing connections.
func freeAddr(t *testing.T) string {
	t.Helper()
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", 12000+rand.IntN(20000))
		if ln, err := net.Listen("tcp", addr); err == nil {
			_ = ln.Close()
			return addr
		}
	}
	t.Fatal("no free port")
	return ""
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it did not come true: %s", what)
		}
	}
}
