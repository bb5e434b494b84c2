// Command gnetecho is the least that an echo server on gnet and gobwas/ws can do: frames are
// parsed over the peeked bytes, unmasked and answered in place, and all frames of one read leave
// in one write; one event loop per core. Any path will do. It is the floor for an echo's cost.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"

	"github.com/gobwas/ws"
	"github.com/panjf2000/gnet/v2"

	"im-gateway/bench/peers/internal/peer"
)

const (
	maxHead  = 8 << 10
	maxFrame = 16 << 20
)

var (
	headEnd = []byte("\r\n\r\n")
	errHead = errors.New("head too large")
)

// open is the context of every connection whose handshake is done.
var open = new(struct{})

type server struct {
	gnet.BuiltinEventEngine
	started chan gnet.Engine
}

func (s *server) OnBoot(e gnet.Engine) gnet.Action {
	s.started <- e
	return gnet.None
}

func (s *server) OnTraffic(c gnet.Conn) gnet.Action {
	in, err := c.Peek(-1)
	if err != nil {
		return gnet.Close
	}
	if c.Context() == nil {
		n, reply, err := handshake(in)
		if err != nil {
			return gnet.Close
		}
		if n == 0 {
			return gnet.None
		}
		if _, err := c.Write(reply); err != nil {
			return gnet.Close
		}
		c.SetContext(open)
		if _, err := c.Discard(n); err != nil {
			return gnet.Close
		}
		if in, err = c.Peek(-1); err != nil {
			return gnet.Close
		}
	}
	read, written, closing := echo(in)
	if written > 0 {
		if _, err := c.Write(in[:written]); err != nil {
			return gnet.Close
		}
	}
	if read > 0 {
		if _, err := c.Discard(read); err != nil {
			return gnet.Close
		}
	}
	if closing {
		return gnet.Close
	}
	return gnet.None
}

// handshake returns the length of the request's head, 0 when it is not whole yet, and the answer.
func handshake(in []byte) (int, []byte, error) {
	i := bytes.Index(in, headEnd)
	if i < 0 {
		if len(in) > maxHead {
			return 0, nil, errHead
		}
		return 0, nil, nil
	}
	n := i + len(headEnd)
	var reply bytes.Buffer
	_, err := ws.Upgrade(readWriter{bytes.NewReader(in[:n]), &reply})
	return n, reply.Bytes(), err
}

type readWriter struct {
	io.Reader
	io.Writer
}

// echo answers the whole frames of in, in place: an answer has no mask, so it never overtakes what
// is still to be read. It returns the bytes read and the bytes of the answers at in's start.
func echo(in []byte) (read, written int, closing bool) {
	for read < len(in) {
		h, n, err := header(in[read:])
		if err != nil {
			return read, written, true
		}
		if n == 0 || len(in)-read-n < int(h.Length) {
			return read, written, false
		}
		payload := in[read+n : read+n+int(h.Length)]
		read += n + len(payload)
		ws.Cipher(payload, h.Mask, 0)
		switch h.OpCode {
		case ws.OpPong:
			continue
		case ws.OpPing:
			h.OpCode = ws.OpPong
		case ws.OpClose:
			closing = true
		}
		written += putHeader(in[written:], h)
		written += copy(in[written:], payload)
		if closing {
			return read, written, true
		}
	}
	return read, written, false
}

// header parses a client's frame header; its length is 0 when it is not whole yet.
func header(in []byte) (ws.Header, int, error) {
	r := bytes.NewReader(in)
	h, err := ws.ReadHeader(r)
	switch {
	case err != nil && len(in) < ws.MaxHeaderSize && !errors.Is(err, ws.ErrHeaderLengthMSB):
		return h, 0, nil
	case err != nil:
		return h, 0, err
	case !h.Masked || h.Length > maxFrame || h.Rsv != 0:
		return h, 0, ws.ErrProtocolMaskRequired
	}
	return h, len(in) - r.Len(), nil
}

// putHeader writes the answer's header: 2, 4 or 10 bytes.
func putHeader(b []byte, h ws.Header) int {
	b[0] = byte(h.OpCode)
	if h.Fin {
		b[0] |= 0x80
	}
	switch n := h.Length; {
	case n < 126:
		b[1] = byte(n)
		return 2
	case n < 1<<16:
		b[1], b[2], b[3] = 126, byte(n>>8), byte(n)
		return 4
	default:
		b[1] = 127
		for i := range 8 {
			b[2+i] = byte(n >> (56 - 8*i))
		}
		return 10
	}
}

// logger keeps gnet off stdout, and silent but for errors.
type logger struct{ *log.Logger }

func (logger) Debugf(string, ...any)            {}
func (logger) Infof(string, ...any)             {}
func (logger) Warnf(string, ...any)             {}
func (l logger) Errorf(format string, a ...any) { l.Printf(format, a...) }

func main() { peer.Main(run) }

func run(ctx context.Context) error {
	addr := flag.String("addr", "127.0.0.1:9001", "address to listen on")
	loops := flag.Int("loops", 0, "event loops; 0: one per core")
	flag.Parse()
	bound, err := resolve(*addr)
	if err != nil {
		return fmt.Errorf("gnetecho: %w", err)
	}
	s := &server{started: make(chan gnet.Engine, 1)}
	done := make(chan error, 1)
	go func() {
		done <- gnet.Run(s, "tcp://"+bound, gnet.WithMulticore(*loops == 0), gnet.WithNumEventLoop(*loops),
			gnet.WithReusePort(true), gnet.WithTCPNoDelay(gnet.TCPNoDelay), gnet.WithLogger(logger{log.New(os.Stderr, "gnetecho: ", 0)}))
	}()
	select {
	case err := <-done:
		return fmt.Errorf("gnetecho: %w", err)
	case e := <-s.started:
		if err := listens(bound); err != nil {
			return fmt.Errorf("gnetecho: %w", err)
		}
		peer.Ready(bound)
		select {
		case <-ctx.Done():
		case err := <-done:
			return fmt.Errorf("gnetecho: the engine ended: %w", err)
		}
		stopCtx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return e.Stop(stopCtx)
	}
}

// resolve turns port 0 into a free port: each loop listens for itself and needs the number.
func resolve(addr string) (string, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return "", err
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String(), nil
}

// listens waits for the loops' listeners, which gnet opens around OnBoot.
func listens(addr string) error {
	var err error
	for range 50 {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", addr, time.Second); err == nil {
			return c.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
