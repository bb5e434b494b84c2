package transport

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Settings are the options that may change while the server runs, see Server.Prepare. Zero values take the
// defaults named.
type Settings struct {
	// Verifier checks tokens. All that a server is given have the same Denials.
	Verifier         *Verifier
	RefuseQueryToken bool     // a token in the query is not taken
	AllowedOrigins   []string // of browsers, see Origins; empty: all

	MaxMessageBytes  int           // of all fragments together; 64 KiB
	MaxFragments     int           // frames of one message; 1024
	HeartbeatTimeout time.Duration // silence after which a connection is closed with 4001, and the most for one message; 75 s
	EgressBudget     int           // bytes; beyond it and 64 KiB the loop itself closes with 4000; 1 MiB

	MaxConnections     int // 0, or more than RLIMIT_NOFILE allows with a head-room: that
	MaxHTTPConnections int // served by net/http at once; 8192
	MaxTLSHandshakes   int // at once; 1024

	// Limits by address, rates and the like; 0: none. The rates may be used two seconds ahead.
	ExemptNetworks       []netip.Prefix // from the limits by address
	ConnectionsPerIP     int            // IPv6: per /64
	ConnectionsPerSubnet int            // IPv4: /24, IPv6: /48
	HandshakesInFlight   int            // connections without a whole first head; beyond: the oldest goes
	HandshakesPerSecond  int
	MessagesPerSecond    int // of one connection
	BytesPerSecond       int // of one connection; two seconds' worth must hold the largest message

	TrustedProxies  TrustedNetworks // believed when they name another address as the client's
	ForwardedHeader string          // by which they do: ForwardedForHeader, the default, or ForwardedHeader
}

// rules are settings in force, with what follows from them. They are never written to: a loop takes the
// newest at the beginning of each piece of work, and other goroutines where they need them.
type rules struct {
	Settings
	origins     Origins
	forwarding  forwarding
	messages    messageRate
	upgradeCost time.Duration // of one against HandshakesPerSecond; 0: no bound
}

// newRules checks settings. Those of an echo server need no verifier.
func newRules(s Settings, echo bool) (*rules, error) {
	def(&s.MaxMessageBytes, 64<<10)
	def(&s.HeartbeatTimeout, 75*time.Second)
	def(&s.EgressBudget, 1<<20)
	def(&s.MaxFragments, 1024)
	def(&s.MaxTLSHandshakes, 1024)
	def(&s.MaxHTTPConnections, 8192)
	if s.Verifier == nil && !echo {
		return nil, errors.New("a verifier is needed")
	}
	possible, err := possibleConnections()
	if err != nil {
		return nil, err
	}
	if s.MaxConnections == 0 || s.MaxConnections > possible {
		s.MaxConnections = possible
	}
	r := &rules{
		Settings: s, origins: NewOrigins(s.AllowedOrigins), messages: newMessageRate(s.MessagesPerSecond, s.BytesPerSecond),
		forwarding: forwarding{trusted: s.TrustedProxies, header: cmp.Or(s.ForwardedHeader, ForwardedForHeader)},
	}
	if s.HandshakesPerSecond > 0 {
		r.upgradeCost = time.Second / time.Duration(s.HandshakesPerSecond)
	}
	return r, nil
}

// possibleConnections keeps the connections, and a head-room for all else, within the process's limit on
// open files: at that limit accept fails.
func possibleConnections() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit on open files: %w", err)
	}
	possible := int(min(limit.Cur, 1<<24)) - fdHeadroom - courtesy
	if possible < 1 {
		return 0, errors.New("the limit on open files leaves no room for connections: raise ulimit -n")
	}
	return possible, nil
}

// warn tells of a setting that cannot be kept.
func (s *Server) warn(wanted int, r *rules) {
	if wanted > r.MaxConnections {
		s.opts.Logger.Warn().Int("configured", wanted).Int("possible", r.MaxConnections).
			Msg("the limit on open files allows fewer connections than configured: raise ulimit -n")
	}
}

// Prepare checks settings and returns what puts them in force: for whatever comes next on every loop, on
// connections that are open already, too. What a connection was admitted by, its token, its origin or its
// address, is not looked at again. apply cannot fail; settings are prepared and applied by one goroutine
// at a time, which may be any.
func (s *Server) Prepare(next Settings) (apply func(), err error) {
	r, err := newRules(next, s.opts.Echo)
	if err != nil {
		return nil, fmt.Errorf("transport settings: %w", err)
	}
	if next.Verifier != nil && next.Verifier.Denials() != s.denials {
		return nil, errors.New("transport settings: the verifier follows another list of denied tokens")
	}
	return func() {
		s.warn(next.MaxConnections, r)
		s.rules.Store(r)
	}, nil
}
