package world

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// Link is the way from somebody to a server, through one fault proxy for each of the server's
// addresses. Faults add up until Restore, which also closes the connections that Cut kept. A fault
// cannot be set or ended while a connection is blocked by a peer that does not read: that is an error,
// and the link is stuck until the peer reads. One goroutine at a time may change a link.
type Link struct {
	name    string
	proxies []*toxiproxy.Proxy
	toxics  int
}

// proxies makes links.
type proxies struct{ server *toxiproxy.ApiServer }

func newProxies() *proxies {
	return &proxies{toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())}
}

// add puts one more proxy, which listens on listen, into a link.
func (p *proxies) add(l *Link, listen, upstream string) error {
	proxy := toxiproxy.NewProxy(p.server, fmt.Sprintf("%s-%d", l.name, len(l.proxies)), listen, upstream)
	if err := proxy.Start(); err != nil {
		return fmt.Errorf("proxy for %s: %w", l.name, err)
	}
	l.proxies = append(l.proxies, proxy)
	return nil
}

// Addr is where the first proxy listens.
func (l *Link) Addr() string { return l.proxies[0].Listen }

func (l *Link) toxic(kind, stream, attributes string) error {
	l.toxics++
	for _, p := range l.proxies {
		body := fmt.Sprintf(`{"name":"%s-%d-%s","type":%q,"stream":%q,"attributes":{%s}}`, kind, l.toxics, stream, kind, stream, attributes)
		err := within(func() error {
			_, err := p.Toxics.AddToxicJson(strings.NewReader(body))
			return err
		})
		if err != nil {
			return fmt.Errorf("%s on %s: %w", kind, l.name, err)
		}
	}
	return nil
}

const changeTimeout = 10 * time.Second

// within bounds a change of a proxy, which has to interrupt what each connection is doing.
func within(change func() error) error {
	done := make(chan error, 1)
	go func() { done <- change() }()
	select {
	case err := <-done:
		return err
	case <-time.After(changeTimeout):
		return errors.New("a connection is blocked by a peer that does not read")
	}
}

// Latency delays each direction.
func (l *Link) Latency(d time.Duration) error {
	a := fmt.Sprintf(`"latency":%d`, d.Milliseconds())
	return errors.Join(l.toxic("latency", "upstream", a), l.toxic("latency", "downstream", a))
}

// Bandwidth limits each direction to so many KB per second.
func (l *Link) Bandwidth(rate int) error {
	a := fmt.Sprintf(`"rate":%d`, rate)
	return errors.Join(l.toxic("bandwidth", "upstream", a), l.toxic("bandwidth", "downstream", a))
}

// Cut lets nothing through; connections stay.
func (l *Link) Cut() error {
	return errors.Join(l.toxic("timeout", "upstream", `"timeout":0`), l.toxic("timeout", "downstream", `"timeout":0`))
}

// Reset resets every connection with the next byte, and new ones too.
func (l *Link) Reset() error { return l.toxic("reset_peer", "upstream", `"timeout":0`) }

// ResetDownstream resets every connection with the next byte of an answer, so that what was asked has
// been done.
func (l *Link) ResetDownstream() error { return l.toxic("reset_peer", "downstream", `"timeout":0`) }

// Down refuses connections and closes those that are there.
func (l *Link) Down() {
	for _, p := range l.proxies {
		p.Stop()
	}
}

// Point makes the link lead to another server. It must be down.
func (l *Link) Point(upstream string) {
	for _, p := range l.proxies {
		p.Upstream = upstream
	}
}

// Up ends Down.
func (l *Link) Up() error {
	for _, p := range l.proxies {
		if err := p.Start(); err != nil && !errors.Is(err, toxiproxy.ErrProxyAlreadyStarted) {
			return fmt.Errorf("%s up: %w", l.name, err)
		}
	}
	return nil
}

// Restore ends every fault.
func (l *Link) Restore(ctx context.Context) error {
	for _, p := range l.proxies {
		err := within(func() error { p.Toxics.ResetToxics(ctx); return nil })
		if err != nil {
			return fmt.Errorf("restore %s: %w", l.name, err)
		}
	}
	return l.Up()
}
