package transport

import (
	"net/url"
	"strings"
)

// Origins is an allow-list of web origins (RFC 6454): `*`, `https://chat.example.com`, or
// `https://*.example.com`, where the asterisk stands for one host label or more. Any goroutine may use it.
type Origins struct {
	all     bool
	exact   map[string]bool // in lower case
	domains []domain
}

// domain is every host below one.
type domain struct{ scheme, suffix, port string } // suffix begins with its dot

// NewOrigins makes a list of what ValidOrigin takes.
func NewOrigins(list []string) Origins {
	o := Origins{exact: map[string]bool{}}
	for _, s := range list {
		s = strings.ToLower(s)
		scheme, rest, _ := strings.Cut(s, "://")
		switch {
		case s == "*":
			o.all = true
		case strings.HasPrefix(rest, "*."):
			host, port, _ := strings.Cut(rest[1:], ":")
			o.domains = append(o.domains, domain{scheme, host, port})
		default:
			o.exact[s] = true
		}
	}
	return o
}

// All tells whether the list holds every origin.
func (o *Origins) All() bool { return o.all }

// Has tells whether an Origin header names an origin of the list.
func (o *Origins) Has(origin string) bool {
	if o.all {
		return true
	}
	origin = strings.ToLower(origin)
	if o.exact[origin] {
		return true
	}
	scheme, rest, ok := strings.Cut(origin, "://")
	if !ok {
		return false
	}
	host, port, _ := strings.Cut(rest, ":")
	for _, d := range o.domains {
		labels, below := strings.CutSuffix(host, d.suffix)
		if below && validLabels(labels) && scheme == d.scheme && port == d.port {
			return true
		}
	}
	return false
}

// validLabels tells whether s is host labels, joined by dots.
func validLabels(s string) bool {
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}

// ValidOrigin tells whether s may stand in a list of origins.
func ValidOrigin(s string) bool {
	if s == "*" {
		return true
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Scheme+"://"+u.Host != s || u.Host == "" {
		return false
	}
	host := strings.ToLower(u.Hostname())
	if below, ok := strings.CutPrefix(host, "*."); ok {
		return validLabels(below) && strings.Contains(below, ".") // not a whole top-level domain
	}
	return !strings.Contains(host, "*")
}
