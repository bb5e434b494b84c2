package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"im-gateway/codec"
)

// TestSizeOfAConnection: 128 is a size class of the allocator, and the next is 144.
func TestSizeOfAConnection(t *testing.T) {
	if size := unsafe.Sizeof(conn{}); size > 128 {
		t.Errorf("a connection takes %d bytes", size)
	}
}

// TestMemoryPerIdleSession holds the gateway's part, gnet's included, of what an idle session costs on
// the heap, the same for a WebSocket and for an event stream. The clients are bare descriptors and cost
// nothing there.
func TestMemoryPerIdleSession(t *testing.T) {
	for _, tc := range []struct{ name, head, answer string }{
		{"WebSocket", "GET /ws HTTP/1.1\r\n" + upgradeLines, "HTTP/1.1 101"},
		{"event stream", "GET /sse HTTP/1.1\r\n" + streamLines, "HTTP/1.1 200"},
	} {
		t.Run(tc.name, func(t *testing.T) { memoryPerIdleSession(t, tc.head, tc.answer) })
	}
}

func memoryPerIdleSession(t *testing.T, head, opened string) {
	const budget = 700 // bytes; most of them are gnet's
	// Both ends have their descriptor in this process: as near to 10,000 as a limit of 20,000 allows.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := min(10_000, int(min(limit.Cur, 1<<20)-200)/2)
	s, sink := start(t, nil)
	warm := connect(t, s, "warm")
	sink.next(t, codec.EventOpen)
	var heads [][]byte
	for i := range n {
		heads = append(heads, []byte(head+"Authorization: Bearer "+
			token(t, "user-"+strconv.Itoa(i), time.Hour)+"\r\n\r\n"))
	}
	addr, ok := s.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal("no TCP address")
	}
	peer := &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}
	files := make([]int, 0, n)
	defer func() {
		for _, fd := range files {
			_ = unix.Close(fd)
		}
	}()
	answer := make([]byte, 512)
	before := heap()
	for _, head := range heads {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, fd)
		if err := unix.Connect(fd, peer); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fd, head); err != nil {
			t.Fatal(err)
		}
		if k, err := unix.Read(fd, answer); err != nil || !strings.HasPrefix(string(answer[:k]), opened) {
			t.Fatalf("%q, %v", answer[:k], err)
		}
	}
	for range n {
		sink.next(t, codec.EventOpen)
	}
	// The queue of unfinished heads is looked after once per tick.
	done := make(chan int)
	eventually(t, func() bool {
		left := 0
		for _, l := range s.loops {
			l.execute(func() { done <- len(l.heads) })
			left += <-done
		}
		return left == 0
	})
	per := float64(heap()-before) / float64(n)
	t.Logf("%.0f bytes of heap per idle session, %d of them", per, n)
	if per > budget {
		t.Errorf("%.0f bytes of heap per idle session, want %d at most", per, budget)
	}
	runtime.KeepAlive(heads)
	_ = warm.Close()
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what the first one left in pools
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// serverProcess makes the test binary an echo server with few descriptors; see TestMain.
const serverProcess = "IM_TRANSPORT_TEST_SERVER"

const serverFiles = 600

// serveAlone runs that server until its standard input ends; it returns the exit code.
func serveAlone() int {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: serverFiles, Max: serverFiles}); err != nil {
		fmt.Println(err)
		return 1
	}
	s, err := New(Options{Addr: "127.0.0.1:0", Loops: 2, Echo: true, Logger: zerolog.Nop(), Registerer: prometheus.NewRegistry()})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if err := s.Start(context.Background()); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(s.Addr())
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	select {
	case <-ended:
		return 0
	case <-s.Done():
		fmt.Println(s.Err())
		return 1
	}
}

// TestStormBeyondTheFileLimit: far more connects at once than the server may have files open. It
// must go on serving, also while the crowd is there.
func TestStormBeyondTheFileLimit(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), serverProcess+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(stdout)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	early := dialEcho(t, addr)
	peer := &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}
	for range 3 {
		files := make([]int, 0, 3000)
		for range cap(files) {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, fd)
			if err := unix.Connect(fd, peer); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				t.Fatal(err)
			}
		}
		early.echo()
		for _, fd := range files {
			_ = unix.Close(fd)
		}
	}
	early.echo()
	eventually(t, func() bool {
		late, err := net.Dial("tcp", addr.String())
		if err != nil {
			return false
		}
		defer func() { _ = late.Close() }()
		_ = late.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(late, "GET / HTTP/1.1\r\n"+upgradeLines+"\r\n"); err != nil {
			return false
		}
		answer := make([]byte, 12)
		_, err = io.ReadFull(late, answer)
		return err == nil && string(answer) == "HTTP/1.1 101"
	})
	_ = stdin.Close()
	if rest, err := io.ReadAll(out); err != nil || len(rest) > 0 {
		t.Errorf("the server says %q, %v", rest, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the server ended: %v", err)
	}
}

func dialEcho(t testing.TB, addr net.Addr) *client {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	e := &client{t, c, bufio.NewReader(c)}
	e.send("GET / HTTP/1.1\r\n", upgradeLines, "\r\n")
	if resp, _ := e.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	return e
}

func (c *client) echo() {
	c.t.Helper()
	c.send(frame(true, ws.OpText, "still here"))
	if f := c.read(); string(f.Payload) != "still here" {
		c.t.Fatalf("got %q", f.Payload)
	}
}
