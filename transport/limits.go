package transport

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// network names the network of one client, an IPv4 address or an IPv6 /64, in 64 bits; 0 stands for
// one that is not counted.
type network uint64

// v4Networks begin where no IPv6 network is: ffff:ffff::/32 is multicast's.
const v4Networks = 0xffffffff << 32

func networkOf(a netip.Addr) network {
	a = a.Unmap()
	if a.Is4() {
		b := a.As4()
		return v4Networks | network(b[0])<<24 | network(b[1])<<16 | network(b[2])<<8 | network(b[3])
	}
	var n network
	b := a.As16()
	for _, x := range b[:8] {
		n = n<<8 | network(x)
	}
	return n
}

// subnet is the IPv4 /24 or the IPv6 /48 that n is in.
func (n network) subnet() network {
	if n&v4Networks == v4Networks {
		return n &^ 0xff
	}
	return n &^ 0xffff
}

// addressCounts counts the connections by network. Loops use it when connections come and go. What came
// while no limit was set, or from a network that was exempt, is not counted later either.
type addressCounts struct {
	mu      sync.Mutex
	ips     map[network]int
	subnets map[network]int
}

func newAddressCounts() addressCounts {
	return addressCounts{ips: map[network]int{}, subnets: map[network]int{}}
}

// take counts a connection from a. ok is false when there are too many; n is for give.
func (c *addressCounts) take(r *rules, a netip.Addr) (n network, ok bool) {
	perIP, perSubnet := r.ConnectionsPerIP, r.ConnectionsPerSubnet
	if perIP == 0 && perSubnet == 0 || !a.IsValid() || contains(r.ExemptNetworks, a) {
		return 0, true
	}
	n = networkOf(a)
	c.mu.Lock()
	defer c.mu.Unlock()
	if perIP > 0 && c.ips[n] >= perIP || perSubnet > 0 && c.subnets[n.subnet()] >= perSubnet {
		return 0, false
	}
	c.ips[n]++
	c.subnets[n.subnet()]++
	return n, true
}

// give ends the count of a connection.
func (c *addressCounts) give(n network) {
	if n == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	less(c.ips, n)
	less(c.subnets, n.subnet())
}

func less(counts map[network]int, n network) {
	if c := counts[n]; c > 1 {
		counts[n] = c - 1
	} else {
		delete(counts, n)
	}
}

func contains(list []netip.Prefix, a netip.Addr) bool {
	a = a.Unmap()
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// addrOf is the address of a socket's peer; not valid where it is none of TCP's.
func addrOf(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// burstSeconds is for how long a rate may be made use of at once.
const burstSeconds = 2

// rate is a bound on how often something happens, for any goroutine. The time at which the past
// would be paid for is kept (GCRA, the leaky bucket as a meter).
type rate struct {
	paid atomic.Int64 // Unix ns
}

// allow counts one more at its cost, unless there were too many; 0: no bound. now is Unix ms.
func (r *rate) allow(cost time.Duration, now int64) bool {
	if cost == 0 {
		return true
	}
	at := now * int64(time.Millisecond)
	for {
		paid := r.paid.Load()
		next := max(paid, at) + int64(cost)
		if next-at > burstSeconds*int64(time.Second) {
			return false
		}
		if r.paid.CompareAndSwap(paid, next) {
			return true
		}
	}
}

// messageRate is what a connection's messages cost against its limits, in ns of the time that they
// use up: the larger of their share in messages and in bytes.
type messageRate struct {
	message float64 // per message
	byte    float64 // per byte
}

func newMessageRate(messages, bytes int) (r messageRate) {
	if messages > 0 {
		r.message = float64(time.Second) / float64(messages)
	}
	if bytes > 0 {
		r.byte = float64(time.Second) / float64(bytes)
	}
	return r
}

func (r *messageRate) cost(messages float64, bytes int) int64 {
	return int64(max(messages*r.message, float64(bytes)*r.byte))
}

// fragmentCost is the share of a message's cost that each frame of a message in pieces has.
const fragmentCost = 1.0 / 16

// verdict is what becomes of what a connection has sent.
type verdict uint8

const (
	withinRate verdict = iota
	beyondRate         // refused
	farBeyond          // the client goes on regardless: closed
)

// spend charges the connection for messages with so many bytes. What is refused is charged as well,
// so that who slows down is heard again and who does not goes too far.
func (cn *conn) spend(messages float64, bytes int) verdict {
	cost := cn.l.rules.messages.cost(messages, bytes)
	if cost == 0 {
		return withinRate
	}
	const burst = burstSeconds * int64(time.Second)
	at := cn.l.now * int64(time.Millisecond)
	cn.paid = max(cn.paid, at) + cost
	switch debt := cn.paid - at; {
	case debt <= burst:
		return withinRate
	case debt <= 2*burst:
		return beyondRate
	default:
		return farBeyond
	}
}

// retryAfterMS is when a message with so many bytes that was refused, and charged, may be sent again.
func (cn *conn) retryAfterMS(bytes int) int32 {
	within := cn.paid + cn.l.rules.messages.cost(1, bytes) - burstSeconds*int64(time.Second)
	return int32(max(1, within/int64(time.Millisecond)+1-cn.l.now))
}
