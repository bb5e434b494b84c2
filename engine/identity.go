package engine

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"strings"
)

const (
	// gatewayIDSuffix is the length of the random part of a generated gateway_id.
	gatewayIDSuffix = 8
	maxGatewayID    = 200
)

// NewGatewayID returns hostname-<random>, what gateway_id is when it is not configured. Characters
// that a gateway_id may not hold are replaced.
func NewGatewayID(hostname string) string {
	name := strings.Map(func(r rune) rune {
		if validGatewayID("x" + string(r)) {
			return r
		}
		return '-'
	}, hostname)
	name = name[:min(len(name), maxGatewayID-gatewayIDSuffix-1)]
	if name == "" {
		name = "im-gateway"
	}
	return name + "-" + strings.ToLower(rand.Text()[:gatewayIDSuffix])
}

// AdvertiseAddr is the address that others dial to reach the listener bound: configured when it
// is set, else bound itself, a host that names every address replaced by one of this machine.
func AdvertiseAddr(configured string, bound net.Addr) (string, error) {
	if configured != "" {
		return configured, nil
	}
	tcp, ok := bound.(*net.TCPAddr)
	if !ok {
		return "", fmt.Errorf("no address to advertise: %v is not a TCP address", bound)
	}
	if !tcp.IP.IsUnspecified() && tcp.IP != nil {
		return tcp.String(), nil
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("find an address to advertise: %w", err)
	}
	ip := chooseIP(addrs)
	if ip == nil {
		return "", errors.New("find an address to advertise: this machine has none but loopback")
	}
	return (&net.TCPAddr{IP: ip, Port: tcp.Port}).String(), nil
}

// chooseIP prefers IPv4, and is nil when there is nothing but loopback and link-local.
func chooseIP(addrs []net.Addr) net.IP {
	var chosen net.IP
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok || !n.IP.IsGlobalUnicast() {
			continue
		}
		if n.IP.To4() != nil {
			return n.IP
		}
		if chosen == nil {
			chosen = n.IP
		}
	}
	return chosen
}
