package transport

import "testing"

func TestOrigins(t *testing.T) {
	list := []string{"https://chat.example.com", "https://*.example.org", "http://*.dev.example.net:8080", "https://[2001:db8::1]:444"}
	for _, s := range list {
		if !ValidOrigin(s) {
			t.Errorf("%s is not taken", s)
		}
	}
	o := NewOrigins(list)
	for origin, want := range map[string]bool{
		"https://chat.example.com":       true,
		"HTTPS://Chat.Example.COM":       true,
		"http://chat.example.com":        false,
		"https://chat.example.com:8443":  false,
		"https://chat.example.com.evil":  false,
		"https://evilchat.example.com":   false,
		"https://a.example.org":          true,
		"https://a.b.example.org":        true,
		"https://A.EXAMPLE.org":          true,
		"https://example.org":            false,
		"https://evilexample.org":        false,
		"https://a.example.org.evil.com": false,
		"https://a.example.org:444":      false,
		"http://a.example.org":           false,
		"https://.example.org":           false,
		"https://a..example.org":         false,
		"https://evil.com/.example.org":  false,
		"https://evil.com#.example.org":  false,
		"https://evil.com@a.example.org": false,
		"https://*.example.org":          false,
		"http://x.dev.example.net:8080":  true,
		"http://x.dev.example.net":       false,
		"http://x.dev.example.net:80800": false,
		"https://[2001:db8::1]:444":      true,
		"null":                           false,
		"":                               false,
		"https://":                       false,
		"chat.example.com":               false,
	} {
		if got := o.Has(origin); got != want {
			t.Errorf("%q: %t", origin, got)
		}
	}
	for _, s := range []string{"", "null", "https://", "https://a/", "ftp://a", "https://*", "https://*.com", "https://a.*.com", "https://*a.example.com",
		"https://**.example.com", "https://a.example.com/path", "*.example.com", "https://user@a.example.com"} {
		if ValidOrigin(s) {
			t.Errorf("%q is taken", s)
		}
	}
}
