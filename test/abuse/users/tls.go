package users

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// front takes the fleet's plain connections and makes TLS connections to the gateway of them.
type front struct {
	ln     net.Listener
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// startFront begins to take connections. The certificate is not verified: it is the suite's own.
func startFront(gateway string) (*front, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("users: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &front{ln: ln, cancel: cancel}
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // see above
	f.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // closed
			}
			f.wg.Go(func() { carry(ctx, d, c, gateway) })
		}
	})
	return f, nil
}

// carry hands on both ways until either end closes.
func carry(ctx context.Context, d *tls.Dialer, plain net.Conn, gateway string) {
	defer func() { _ = plain.Close() }()
	secure, err := d.DialContext(ctx, "tcp", gateway)
	if err != nil {
		return // the fleet sees its connection end
	}
	var wg sync.WaitGroup
	both := func() { _ = plain.Close(); _ = secure.Close() }
	stop := context.AfterFunc(ctx, both)
	defer stop()
	wg.Go(func() { defer both(); _, _ = io.Copy(secure, plain) })
	wg.Go(func() { defer both(); _, _ = io.Copy(plain, secure) })
	wg.Wait()
}

// url is the front's address in place of the gateway's.
func (f *front) url(of string) string {
	_, path, _ := strings.Cut(strings.TrimPrefix(of, "wss://"), "/")
	return "ws://" + f.ln.Addr().String() + "/" + path
}

// close ends every connection.
func (f *front) close() error {
	err := f.ln.Close()
	f.cancel()
	f.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
