package fleet

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// deadEnd lets a server speak stream and be gone, its socket with it, before the fleet reads a
// byte: the first answer is met by a reset, the next ones fail in write(2).
func deadEnd(t *testing.T, stream string, messages int) *recorder {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close() //nolint:errcheck // the test's end
	r := &recorder{}
	f := start(t, Options{URLs: []string{"ws://" + ln.Addr().String() + "/"}, Handler: r})
	f.Connect(0, time.Now())
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	gone, busy := make(chan struct{}), make(chan struct{})
	f.Do(func() { close(busy); <-gone })
	<-busy
	if _, err := io.WriteString(c, switching+stream); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	close(gone)
	r.await(t, "the end", func() bool { return len(r.closed) > 0 })
	f.DoWait(func() {})
	f.DoWait(func() {})
	if len(r.closed) != 1 || len(r.messages) != messages {
		t.Errorf("%d messages, closed %q", len(r.messages), r.closed)
	}
	return r
}

// A connection's end is told once, whichever of its last writes fails.
func TestClosedOnce(t *testing.T) {
	t.Run("a pong fails", func(t *testing.T) { deadEnd(t, strings.Repeat("\x89\x00", 5)+"\x81\x01a", 0) })
	t.Run("the answer to the close fails", func(t *testing.T) {
		if r := deadEnd(t, "\x81\x01a"+"\x89\x00"+"\x88\x02\x0f\xa2", 1); !strings.HasPrefix(r.closed[0], "0: 4002 ") {
			t.Errorf("closed %q", r.closed)
		}
	})
	t.Run("words behind the close", func(t *testing.T) {
		if r := deadEnd(t, "\x88\x02\x0f\xa2"+"\x88\x02\x0f\xa3"+"\x81\x01a", 0); r.closed[0] != "0: 4002 <nil>" {
			t.Errorf("closed %q", r.closed)
		}
	})
	t.Run("no code", func(t *testing.T) {
		if r := deadEnd(t, "\x88\x00", 0); r.closed[0] != "0: 1005 <nil>" {
			t.Errorf("closed %q", r.closed)
		}
	})
	t.Run("no close frame", func(t *testing.T) {
		if r := deadEnd(t, "\x81\x01a", 1); !strings.HasPrefix(r.closed[0], "0: 0 ") {
			t.Errorf("closed %q", r.closed)
		}
	})
}

// A server that asks for pongs and never reads them is given up once.
func TestPongsThatNobodyReads(t *testing.T) {
	ping := append([]byte("\x89\x7d"), bytes.Repeat([]byte("p"), 125)...)
	u := rawServer(t, func(c net.Conn) {
		_, _ = io.WriteString(c, switching)
		for b := bytes.Repeat(ping, 500); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	r := &recorder{}
	f := start(t, Options{URLs: []string{u}, Handler: r})
	f.Connect(0, time.Now())
	r.await(t, "the end", func() bool { return len(r.closed) > 0 })
	f.DoWait(func() {})
	if len(r.closed) != 1 || !strings.Contains(r.closed[0], ErrBacklog.Error()) {
		t.Errorf("closed %q", r.closed)
	}
}

// What RFC 6455, sections 5.4 and 5.5, forbids ends the connection.
func TestForbiddenFrames(t *testing.T) {
	long := binary.BigEndian.AppendUint64([]byte("\x82\x7f"), 1<<63)
	for name, stream := range map[string]string{
		"a message within a message": "\x01\x01a" + "\x81\x01b",
		"a ping in pieces":           "\x09\x01a",
		"a ping of 126 bytes":        "\x89\x7e\x00\x7e" + strings.Repeat("p", 126),
		"a close in pieces":          "\x08\x02\x0f\xa2",
		"a length below 0":           string(long),
		"a length of 16 MiB and 1":   "\x82\x7f\x00\x00\x00\x00\x01\x00\x00\x01",
	} {
		t.Run(name, func(t *testing.T) {
			u := rawServer(t, func(c net.Conn) {
				_, _ = io.WriteString(c, switching+stream)
				_, _ = io.Copy(io.Discard, c)
			})
			r := &recorder{}
			f := start(t, Options{URLs: []string{u}, Handler: r})
			f.Connect(0, time.Now())
			r.await(t, "the end", func() bool { return len(r.closed) > 0 })
			if len(r.messages) != 0 || len(r.closed) != 1 || !strings.Contains(r.closed[0], "bad frame") {
				t.Errorf("messages %q, closed %q", r.messages, r.closed)
			}
		})
	}
}

// A message in pieces is bounded as one in a piece is.
func TestEndlessMessage(t *testing.T) {
	piece := binary.BigEndian.AppendUint64([]byte("\x00\x7f"), 1<<20)
	piece = append(piece, bytes.Repeat([]byte("x"), 1<<20)...)
	u := rawServer(t, func(c net.Conn) {
		_, _ = io.WriteString(c, switching+"\x01\x00")
		for range 64 {
			if _, err := c.Write(piece); err != nil {
				return
			}
		}
		_, _ = io.WriteString(c, "\x88\x02\x0f\xa2")
	})
	r := &recorder{}
	f := start(t, Options{URLs: []string{u}, Handler: r})
	f.Connect(0, time.Now())
	r.await(t, "the end", func() bool { return len(r.closed) > 0 })
	if !strings.Contains(r.closed[0], "bad frame") {
		t.Errorf("closed %q", r.closed)
	}
}

// The head of a refusal may come without its body, which says why.
func TestRefusalInPieces(t *testing.T) {
	const refusal = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 22\r\n\r\n{\"code\":\"AUTH_FAILED\"}"
	for name, pieces := range map[string][]string{
		"head and body": {refusal[:50], refusal[50:]},
		"cut off":       {refusal[:60]},
		"byte by byte":  strings.Split(refusal, ""),
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{}
			var f *Fleet
			var up sync.WaitGroup
			up.Add(1)
			u := rawServer(t, func(c net.Conn) {
				up.Wait()
				for _, s := range pieces {
					_, _ = io.WriteString(c, s)
					f.DoWait(func() {})
					time.Sleep(time.Millisecond) // a piece a read
				}
			})
			f = start(t, Options{URLs: []string{u}, Handler: r})
			up.Done()
			f.Connect(0, time.Now())
			r.await(t, "the end", func() bool { return len(r.closed) > 0 })
			if len(r.closed) != 1 || !strings.Contains(r.closed[0], "401") || name != "cut off" && !strings.Contains(r.closed[0], "AUTH_FAILED") {
				t.Errorf("closed %q", r.closed)
			}
		})
	}
}
