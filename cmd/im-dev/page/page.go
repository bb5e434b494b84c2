package page

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

//go:embed static
var static embed.FS

// Options configure the page.
type Options struct {
	// Gateways are the base URLs that the browser calls, such as http://127.0.0.1:8080; it goes from
	// one to the next when one does not answer. A host that means every interface (0.0.0.0, ::, none)
	// is replaced by the one that the page itself was asked for, so that a phone finds the gateway.
	Gateways []string
}

// Handler serves the page.
type Handler struct {
	gateways []*url.URL
	index    *template.Template
	files    http.Handler
}

// New returns the handler of the page.
func New(o Options) (*Handler, error) {
	h := &Handler{}
	for _, g := range o.Gateways {
		u, err := url.Parse(g)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("demo page: %q is no http or https URL", g)
		}
		h.gateways = append(h.gateways, u)
	}
	if len(h.gateways) == 0 {
		return nil, errors.New("demo page: no gateway")
	}
	files, err := fs.Sub(static, "static")
	if err != nil {
		return nil, fmt.Errorf("demo page: %w", err)
	}
	if h.index, err = template.ParseFS(files, "index.html"); err != nil {
		return nil, fmt.Errorf("demo page: %w", err)
	}
	h.files = http.FileServerFS(files)
	return h, nil
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	gateways := h.seenFrom(r.Host)
	header := w.Header()
	header.Set("Content-Security-Policy", contentPolicy(gateways))
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cache-Control", "no-cache") // a new im-dev may bring a new page
	if r.URL.Path != "/" && r.URL.Path != "/index.html" {
		h.files.ServeHTTP(w, r)
		return
	}
	var b bytes.Buffer
	if err := h.index.Execute(&b, map[string]string{"Gateways": strings.Join(gateways, " ")}); err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	header.Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b.Bytes()) // who asked may be gone
}

// plainHost is what a host may look like to be written into a header and a page.
var plainHost = regexp.MustCompile(`^[A-Za-z0-9.:-]+$`)

// seenFrom returns the gateways' URLs for a browser that reached this page as host.
func (h *Handler) seenFrom(host string) []string {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host // no port
	}
	if !plainHost.MatchString(name) {
		name = "127.0.0.1"
	}
	urls := make([]string, len(h.gateways))
	for i, u := range h.gateways {
		seen := url.URL{Scheme: u.Scheme, Host: u.Host}
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "" || ip != nil && ip.IsUnspecified() {
			seen.Host = strings.TrimSuffix(net.JoinHostPort(name, u.Port()), ":")
		}
		urls[i] = seen.String()
	}
	return urls
}

func contentPolicy(gateways []string) string {
	connect := append([]string{"'self'"}, gateways...)
	for _, g := range gateways {
		connect = append(connect, strings.Replace(g, "http", "ws", 1))
	}
	return "default-src 'self'; connect-src " + strings.Join(connect, " ") +
		"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
