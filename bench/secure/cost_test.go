// Package secure measures what TLS and compression cost the transport, beside plain connections.
package secure

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/klauspost/compress/flate"
	"github.com/prometheus/procfs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is `im-bench echo` in a process of its own.
type server struct {
	addr string
	proc procfs.Proc
}

func build(t testing.TB) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "im-bench")
	if out, err := exec.Command("go", "build", "-o", bin, "im-gateway/cmd/im-bench").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return bin
}

func start(t testing.TB, bin string, args ...string) *server {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, bin, append([]string{"echo", "-addr", "127.0.0.1:0", "-loops", "1"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	_, addr, _ := strings.Cut(line, "://")
	proc, err := procfs.NewProc(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return &server{strings.TrimSuffix(strings.TrimSpace(addr), "/ws"), proc}
}

func (s *server) stat(t testing.TB) procfs.ProcStat {
	t.Helper()
	stat, err := s.proc.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return stat
}

// certificate writes a key pair and returns the files and whom to trust.
func certificate(t testing.TB) (cert, key string, roots *x509.CertPool) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, priv.Public(), priv)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	return cert, key, roots
}

func open(addr string, secure *tls.Config, deflate bool) (net.Conn, *bufio.Reader, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	if secure != nil {
		c = tls.Client(c, secure)
	}
	offer := ""
	if deflate {
		offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
	}
	if _, err := fmt.Fprintf(c, "GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n", offer); err != nil {
		return nil, nil, err
	}
	r := bufio.NewReaderSize(c, 4096)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil, nil, err
		}
		if line == "\r\n" {
			return c, r, nil
		}
	}
}

const (
	idle  = 2000 // connections for the cost of one
	chats = 50   // that send
)

// BenchmarkEcho reports the server's CPU for one echo, for one connect, and what an idle connection takes,
// which a second measurement at half as many makes a slope.
func BenchmarkEcho(b *testing.B) {
	bin := build(b)
	cert, key, roots := certificate(b)
	config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	for _, c := range []struct {
		name    string
		args    []string
		secure  *tls.Config
		deflate bool
		size    int
	}{
		{"plain/128", nil, nil, false, 128},
		{"tls/128", []string{"-tls-cert", cert, "-tls-key", key}, config, false, 128},
		{"plain/2048", nil, nil, false, 2048},
		{"tls/2048", []string{"-tls-cert", cert, "-tls-key", key}, config, false, 2048},
		{"deflate/2048", []string{"-compression"}, nil, true, 2048},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := start(b, bin, c.args...)
			message := frame(b, c.size, c.deflate)
			var held []net.Conn
			b.Cleanup(func() {
				for _, c := range held {
					_ = c.Close()
				}
			})
			before := s.stat(b)
			half := 0
			for i := range idle {
				conn, r, err := open(s.addr, c.secure, c.deflate)
				if err != nil {
					b.Fatal(err)
				}
				held = append(held, conn)
				if i < idle/2 {
					if i == idle/2-1 {
						half = s.stat(b).ResidentMemory()
					}
				}
				if err := exchange(conn, r, message); err != nil {
					b.Fatal(err)
				}
			}
			after := s.stat(b)
			var wg sync.WaitGroup
			from := s.stat(b)
			b.ResetTimer()
			for i := range chats {
				wg.Go(func() {
					r := bufio.NewReaderSize(held[i], 4096)
					for range b.N / chats {
						if err := exchange(held[i], r, message); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric((after.CPUTime()-before.CPUTime())/idle*1e6, "server-us/connect")
			b.ReportMetric(float64(after.ResidentMemory()-half)/(idle/2), "server-B/connection")
			b.ReportMetric((s.stat(b).CPUTime()-from.CPUTime())/float64(b.N/chats*chats)*1e6, "server-us/echo")
		})
	}
}

// frame is a message of a chat's kind of text, in one masked frame.
func frame(b *testing.B, size int, deflate bool) []byte {
	b.Helper()
	text := strings.Repeat(`{"type":"send-message","message_id":"c-1","data":{"content":"some words of a chat, and others"}} `, size/90+1)[:size]
	payload := []byte(text)
	var rsv byte
	if deflate {
		var out bytes.Buffer
		w, err := flate.NewWriter(&out, 6)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = w.Write(payload) // a buffer takes everything
		_ = w.Flush()
		payload, rsv = bytes.TrimSuffix(out.Bytes(), []byte("\x00\x00\xff\xff")), 4
	}
	f := ws.NewFrame(ws.OpText, true, payload)
	f.Header.Rsv = rsv
	var out bytes.Buffer
	if err := ws.WriteFrame(&out, ws.MaskFrame(f)); err != nil {
		b.Fatal(err)
	}
	return out.Bytes()
}

func exchange(c net.Conn, r *bufio.Reader, message []byte) error {
	if _, err := c.Write(message); err != nil {
		return err
	}
	h, err := ws.ReadHeader(r)
	if err != nil {
		return err
	}
	_, err = r.Discard(int(h.Length))
	return err
}
