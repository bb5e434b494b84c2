package broker

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// link is the network under one sarama client. cut ends it for good: open connections are closed,
// dials fail and waits return at once, so that whatever sarama is doing comes to its end. All methods
// may be called from any goroutine.
type link struct {
	dialer net.Dialer
	ctx    context.Context // ended by cut
	cut    context.CancelFunc
}

func newLink() *link {
	ctx, cut := context.WithCancel(context.Background())
	return &link{dialer: net.Dialer{Timeout: dialTimeout}, ctx: ctx, cut: cut}
}

// Dial implements sarama's proxy.Dialer.
func (l *link) Dial(network, addr string) (net.Conn, error) {
	c, err := l.dialer.DialContext(l.ctx, network, addr)
	if err != nil {
		l.wait(reconnectPause)
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	lc := &linkConn{Conn: c}
	lc.stop = context.AfterFunc(l.ctx, func() { _ = c.Close() })
	return lc, nil
}

// wait pauses for d, or until the link is cut. It always returns 0, what is left to wait: sarama
// sleeps for what its back-off functions return, and such a sleep could not be cut short.
func (l *link) wait(d time.Duration) time.Duration {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.ctx.Done():
	}
	return 0
}

// linkConn is a connection that its link can close.
type linkConn struct {
	net.Conn
	once sync.Once
	stop func() bool
}

func (c *linkConn) Close() error {
	c.once.Do(func() { c.stop() })
	return c.Conn.Close()
}
