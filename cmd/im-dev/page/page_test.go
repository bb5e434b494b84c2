package page

import (
	"io/fs"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

func serve(t *testing.T, gateways []string, method, host, path string) *httptest.ResponseRecorder {
	t.Helper()
	h, err := New(Options{Gateways: gateways})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(method, path, nil)
	r.Host = host
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestGatewaysAsTheBrowserReachesThem(t *testing.T) {
	for _, tc := range []struct{ name, gateway, host, want string }{
		{"fixed", "http://127.0.0.1:8080", "localhost:8090", "http://127.0.0.1:8080"},
		{"every interface", "http://0.0.0.0:8080", "192.168.1.7:8090", "http://192.168.1.7:8080"},
		{"every interface, IPv6", "http://[::]:8080", "[fe80::1]:8090", "http://[fe80::1]:8080"},
		{"no host", "http://:8080", "chat.example:8090", "http://chat.example:8080"},
		{"no port", "https://0.0.0.0", "chat.example", "https://chat.example"},
		{"a host that would break out", "http://0.0.0.0:8080", `x; script-src "*":8090`, "http://127.0.0.1:8080"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := serve(t, []string{tc.gateway, "http://two:1"}, "GET", tc.host, "/")
			if want := `content="` + tc.want + ` http://two:1"`; !strings.Contains(w.Body.String(), want) {
				t.Errorf("the page does not hold %s", want)
			}
			policy := w.Header().Get("Content-Security-Policy")
			for _, url := range []string{tc.want, strings.Replace(tc.want, "http", "ws", 1), "http://two:1", "ws://two:1"} {
				if !strings.Contains(policy+" ", " "+url+";") && !strings.Contains(policy, " "+url+" ") {
					t.Errorf("the policy %q does not allow %s", policy, url)
				}
			}
		})
	}
}

func TestRefusesGatewaysThatAreNone(t *testing.T) {
	for _, gateways := range [][]string{nil, {""}, {"127.0.0.1:8080"}, {"ftp://h"}, {"http://[::"}} {
		if _, err := New(Options{Gateways: gateways}); err == nil {
			t.Errorf("%q was taken", gateways)
		}
	}
}

func TestFiles(t *testing.T) {
	gateways := []string{"http://127.0.0.1:8080"}
	for _, tc := range []struct {
		method, path string
		code         int
		kind         string
	}{
		{"GET", "/", 200, "text/html; charset=utf-8"},
		{"HEAD", "/", 200, "text/html; charset=utf-8"},
		{"GET", "/app.js", 200, "text/javascript; charset=utf-8"},
		{"GET", "/client/index.js", 200, "text/javascript; charset=utf-8"},
		{"GET", "/style.css", 200, "text/css; charset=utf-8"},
		{"GET", "/icon.svg", 200, "image/svg+xml"},
		{"GET", "/page.go", 404, ""},
		{"GET", "/../page.go", 404, ""},
		{"POST", "/", 405, ""},
	} {
		t.Run(tc.method+tc.path, func(t *testing.T) {
			w := serve(t, gateways, tc.method, "localhost:8090", tc.path)
			if w.Code != tc.code {
				t.Fatalf("status %d, want %d", w.Code, tc.code)
			}
			if got := w.Header().Get("Content-Type"); tc.kind != "" && got != tc.kind {
				t.Errorf("type %s, want %s", got, tc.kind)
			}
		})
	}
}

// The policy forbids inline scripts and styles and other hosts: none may creep in.
func TestNothingInlineNothingFromElsewhere(t *testing.T) {
	bad := regexp.MustCompile(`(?i)<script>|<style|\sstyle=|\son[a-z]+=|(src|href)="?(https?:)?//|@import|url\(`)
	err := fs.WalkDir(static, "static", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, ".js") {
			return err
		}
		text, err := fs.ReadFile(static, path)
		if found := bad.Find(text); found != nil {
			t.Errorf("%s holds %q", path, found)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Each id that app.js looks up stands in the page, under the same data-testid when it has one.
func TestIDsAgree(t *testing.T) {
	html, err := fs.ReadFile(static, "static/index.html")
	if err != nil {
		t.Fatal(err)
	}
	script, err := fs.ReadFile(static, "static/app.js")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`\$\("([a-z-]+)"\)`).FindAllSubmatch(script, -1) {
		if !strings.Contains(string(html), ` id="`+string(m[1])+`"`) {
			t.Errorf("index.html has no element %s", m[1])
		}
	}
	for _, m := range regexp.MustCompile(` id="([^"]+)" data-testid="([^"]+)"`).FindAllSubmatch(html, -1) {
		if string(m[1]) != string(m[2]) {
			t.Errorf("id %s has data-testid %s", m[1], m[2])
		}
	}
}
