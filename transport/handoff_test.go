package transport

import (
	"crypto/ed25519"
	"errors"
	"io"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"im-gateway/codec"
)

func TestHTTPMethodsAndBodies(t *testing.T) {
	s, _ := start(t, func(o *Options) {
		o.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/large":
				w.WriteHeader(http.StatusOK)
				for range 128 {
					if _, err := io.WriteString(w, strings.Repeat("x", 64<<10)); err != nil {
						return
					}
				}
			case "/limited":
				if _, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10)); err != nil {
					http.Error(w, "too large", http.StatusRequestEntityTooLarge)
				}
			case "/panic":
				panic("injected")
			default:
				w.Header().Set("X-Method", r.Method)
				body, _ := io.ReadAll(r.Body)
				_, _ = w.Write(body)
			}
		})
	})
	url := "http://" + s.Addr().String()
	do := func(method, path string, body io.Reader) (*http.Response, string, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, url+path, body)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, "", err
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		return resp, string(b), err
	}
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"} {
		resp, body, err := do(method, "/x", nil)
		if err != nil || resp.Header.Get("X-Method") != method || body != "" {
			t.Errorf("%s: %v %q", method, err, body)
		}
	}
	// A body that fits is echoed, whether its length is known or not.
	want := strings.Repeat("0123456789", 20_000)
	for _, body := range []io.Reader{strings.NewReader(want), io.MultiReader(strings.NewReader(want))} {
		if _, got, err := do("POST", "/x", body); err != nil || got != want {
			t.Errorf("echo: %d bytes, %v", len(got), err)
		}
	}
	// A larger answer than the connection's buffer waits for its reader.
	if _, got, err := do("GET", "/large", nil); err != nil || len(got) != 8<<20 {
		t.Errorf("large answer: %d bytes, %v", len(got), err)
	}
	// An upload beyond all bounds still gets its answer.
	c := dial(t, s)
	c.send("POST /limited HTTP/1.1\r\nHost: h\r\nContent-Length: 3000000\r\n\r\n")
	go func() { _, _ = c.Write(make([]byte, 3_000_000)) }()
	if resp, _ := c.answer(); resp.StatusCode != 413 {
		t.Errorf("upload: %s", resp.Status)
	}
	// A panic costs its own connection.
	if _, _, err := do("POST", "/panic", nil); err == nil {
		t.Error("an answer from a handler that panicked")
	}
	if n := testutil.ToFloat64(s.metrics.panics); n != 1 {
		t.Errorf("%v panics counted", n)
	}
	if _, _, err := do("GET", "/x", nil); err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
	_ = c.Close()
	eventually(t, func() bool { return s.Connections() == 0 })
}

// TestSlowReaderOfAnAnswer: the handler waits for the reader, and is told when its time is over.
func TestSlowReaderOfAnAnswer(t *testing.T) {
	failed := make(chan error, 1)
	s, _ := start(t, func(o *Options) {
		o.API = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			for {
				if _, err := io.WriteString(w, strings.Repeat("x", 64<<10)); err != nil {
					failed <- err
					return
				}
			}
		})
	})
	c := dial(t, s)
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the write ended with %v", err)
	}
	eventually(t, func() bool { return s.Connections() == 0 })
}

// TestClientLeavesDuringARequest: the handler's context ends.
func TestClientLeavesDuringARequest(t *testing.T) {
	entered, left := make(chan struct{}), make(chan struct{})
	s, _ := start(t, func(o *Options) {
		o.API = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(entered)
			<-r.Context().Done()
			close(left)
		})
	})
	c := dial(t, s)
	c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	<-entered
	_ = c.Close()
	<-left
}

// TestSlowVerifierAfterHTTP: frames that come while the token of a handed-back connection is being
// checked are not lost, wherever they lie by then.
func TestSlowVerifierAfterHTTP(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewVerifier(VerifierOptions{Algorithm: "EdDSA", PublicKeyPEM: pemOf(t, public)})
	if err != nil {
		t.Fatal(err)
	}
	s, sink := start(t, func(o *Options) { o.Settings.Verifier = v; o.Loops = 1 })
	token := string(signed(t, jwa.EdDSA, private))
	// Every checker is held, and the queue is full.
	var running atomic.Int64
	blocker := func() (block, release func()) {
		hold := make(chan struct{})
		return func() { running.Add(1); <-hold }, func() { close(hold) }
	}
	block, release := blocker()
	eventually(t, func() bool {
		held := int(running.Load()) == max(1, runtime.GOMAXPROCS(0)/2) // before: then the queue stays full
		select {
		case s.verify <- block:
			return false
		default:
			return held
		}
	})
	refused := dial(t, s)
	refused.send("GET /ws?token=", token, " HTTP/1.1\r\n", upgradeLines, "\r\n")
	if resp, _ := refused.answer(); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("queue full: %s", resp.Status)
	}
	release()
	eventually(t, func() bool { return int(running.Load()) >= cap(s.verify) && len(s.verify) == 0 })

	running.Store(0)
	block, release = blocker()
	for range max(1, runtime.GOMAXPROCS(0)/2) {
		s.verify <- block
	}
	eventually(t, func() bool { return int(running.Load()) == max(1, runtime.GOMAXPROCS(0)/2) })
	c := dial(t, s)
	c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
	c.answer()
	m := text(`{"type":"m","message_id":"1","data":1}`)
	c.send("GET /ws?token=", token, " HTTP/1.1\r\n", upgradeLines, "\r\n", m[:3])
	eventually(t, func() bool { return len(s.verify) == 1 })
	c.send(m[3:], text(`{"type":"m","message_id":"2","data":1}`))
	other := dial(t, s) // what the one loop has answered here it has read there
	other.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
	other.answer()
	release()
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	for _, want := range []string{"1", "2"} {
		if e := sink.next(t, codec.EventMessage); string(e.Upstream.ClientMsgID) != want {
			t.Errorf("message %s, want %s", e.Upstream.ClientMsgID, want)
		}
	}
}

// TestPipelinedUpgrade: the upgrade comes in one packet with the requests before it.
func TestPipelinedUpgrade(t *testing.T) {
	s, sink := start(t, nil)
	c := dial(t, s)
	c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\nPOST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhiGET /ws?token=", token(t, "alice", time.Hour),
		" HTTP/1.1\r\n", upgradeLines, "\r\n", text(`{"type":"ping"}`), frame(true, ws.OpClose, "\x03\xe8"))
	for _, want := range []string{"GET /a ", "POST /b hi"} {
		if _, body := c.answer(); body != want {
			t.Errorf("body %q, want %q", body, want)
		}
	}
	if resp, _ := c.answer(); resp.StatusCode != 101 {
		t.Fatal(resp.Status)
	}
	if f := c.read(); !strings.Contains(string(f.Payload), "pong") {
		t.Errorf("got %q", f.Payload)
	}
	if code := c.closed(); code != 1000 {
		t.Errorf("closed with %d", code)
	}
	if e := sink.next(t, codec.EventClose); e.Code != 1000 || e.Reason != reasonPeer {
		t.Errorf("%+v", e)
	}
}

// TestRefusedUpgradeAfterHTTP gets the same answer as a fresh one.
func TestRefusedUpgradeAfterHTTP(t *testing.T) {
	s, _ := start(t, nil)
	for _, tc := range []struct {
		request string
		status  int
	}{
		{"GET /ws HTTP/1.1\r\n" + upgradeLines + "\r\n", 401},
		{"GET /ws HTTP/1.1\r\n" + strings.Replace(upgradeLines, "Version: 13", "Version: 7", 1) + "Authorization: Bearer " + token(t, "a", time.Hour) + "\r\n\r\n", 426},
		{"DELETE /ws HTTP/1.1\r\n" + upgradeLines + "\r\n", 405},
		{"GET /ws HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("x", 20_000) + "\r\n\r\n", 431},
	} {
		c := dial(t, s)
		c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
		c.answer()
		c.send(tc.request)
		if resp, body := c.answer(); resp.StatusCode != tc.status {
			t.Errorf("%s %s, want %d", resp.Status, body, tc.status)
		}
	}
}
