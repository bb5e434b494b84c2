package adminpage

import (
	"context"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"im-gateway/codec/gatewaypb"
)

// fake is a gateway in trouble.
type fake struct {
	gatewaypb.UnimplementedAdminServiceServer
	state  string
	acting bool
	down   bool // nothing is answered
}

const evil = `<script>alert(1)</script>"'`

func (f *fake) Status(context.Context, *gatewaypb.StatusRequest) (*gatewaypb.StatusResponse, error) {
	if f.down {
		return nil, status.Error(codes.Internal, "the metrics cannot be read")
	}
	s := &gatewaypb.StatusResponse{
		GatewayId: "g-1" + evil, Version: "v9", State: f.state, StartedAt: 1000, Now: 3_661_000, Acting: f.acting,
		Sessions: 1234567, Users: 1, LogLevel: "warn", MemoryBytes: 3 << 30, MemoryLimitBytes: 4 << 30, ConnectionsBound: 2_000_000,
		Dependencies: []*gatewaypb.Dependency{
			{Name: "etcd", State: "up", Since: 1000},
			{Name: "kafka", State: "down", Since: 3_600_000, Error: "connection refused" + evil},
		},
	}
	if f.state == "starting" {
		s.Missing = []*gatewaypb.Condition{{Name: "kafka", Reason: "dial tcp" + evil}}
	}
	return s, nil
}

func (f *fake) Ledger(context.Context, *gatewaypb.LedgerRequest) (*gatewaypb.LedgerResponse, error) {
	return &gatewaypb.LedgerResponse{
		Upstream:   &gatewaypb.Account{In: 4321, Open: 21, Ends: map[string]int64{"stored": 4300, "OVERLOADED": 0}, Balanced: true},
		Downstream: &gatewaypb.Account{In: 100_000, Open: 1, Ends: map[string]int64{"delivered": 99_998}},
	}, nil
}

func (f *fake) Queues(context.Context, *gatewaypb.QueuesRequest) (*gatewaypb.QueuesResponse, error) {
	return &gatewaypb.QueuesResponse{Queues: []*gatewaypb.Queue{
		{Name: "idle queue", Unit: "batches", Bound: 64, WhenFull: "somebody waits"},
		{Name: "full queue", Unit: "bytes", Depth: 60 << 20, Bound: 64 << 20, Overflows: 1, WhenFull: "messages are refused"},
	}}, nil
}

func (f *fake) TopTalkers(context.Context, *gatewaypb.TopTalkersRequest) (*gatewaypb.TopTalkersResponse, error) {
	if f.state == "starting" {
		return nil, status.Error(codes.Unavailable, "the gateway is starting")
	}
	return &gatewaypb.TopTalkersResponse{
		WindowMs: 3000, Users: 7, Missed: 9,
		Senders: []*gatewaypb.Talker{{UserId: "a&b" + evil, MessagesIn: 30, BytesIn: 6000}},
	}, nil
}

func (f *fake) FindUser(_ context.Context, r *gatewaypb.FindUserRequest) (*gatewaypb.FindUserResponse, error) {
	switch r.GetUserId() {
	case "nobody":
		return &gatewaypb.FindUserResponse{UserId: "nobody"}, nil
	case "redis away":
		return &gatewaypb.FindUserResponse{UserId: "redis away", ElsewhereError: "i/o timeout"}, nil
	case "bad":
		return nil, status.Error(codes.InvalidArgument, "user_id: not one")
	}
	return &gatewaypb.FindUserResponse{
		UserId: r.GetUserId(),
		Sessions: []*gatewaypb.Session{
			{SessionId: "s-1", State: "live", ConnectedAt: 1_795_874_169_956, MessagesIn: 5000, DeviceId: evil},
			{SessionId: "s-2", State: "live", PendingBytes: 2048},
		},
		Elsewhere: []*gatewaypb.Place{{GatewayId: "g-2", SessionId: "s-3"}},
	}, nil
}

func get(t *testing.T, f *fake, path string) *httptest.ResponseRecorder {
	t.Helper()
	h, err := New(f, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

func TestPage(t *testing.T) {
	for _, tc := range []struct {
		name, path string
		fake       fake
		status     int
		want, not  []string
	}{
		{"ready", "/", fake{state: "ready", acting: true}, 200, []string{
			`id="state">ready<`, "1,234,567", "of 1 user<", "up 1 h 1 min", "3.0 GiB", "limit 4.0 GiB", `data-acting="locked"`, `id="token"`,
			`<span class="badge down">down</span>`, "1 min 1 s", "connection refused", ">stored<", "4,300", "99.5 %", "still counting", "adds up",
			"60.0 MiB", "was full once: messages are refused", `value="warn" aria-pressed="true"`, `title="when full: somebody waits"`,
		}, []string{"Waiting for", "OVERLOADED", `id="acting-off"`, "Session here"}},
		{"starting, without a token", "/", fake{state: "starting"}, 200, []string{
			`id="state">starting<`, "Waiting for", "dial tcp", `data-acting="off"`, "admin.token_file", "There are no sessions yet",
		}, []string{`id="token"`}},
		{"with a user", "/?user=bob", fake{state: "ready"}, 200, []string{`value="bob"`, "s-1", "g-2"}, nil},
		{"live", "/page/live", fake{state: "draining"}, 200, []string{
			`id="state">draining<`, `data-now="3661000"`, `data-level="warn"`, `data-total="4321"`, `id="queues"`, `id="ledger"`,
		}, []string{"<html", "<form", "<script"}},
		{"talkers", "/page/talkers", fake{state: "ready"}, 200, []string{
			"a&amp;b", `href="?user=a%26b`, "10.0", "2.0 KiB", "nobody", "7 users active in the last 3.0 s; 9 messages of further ones",
		}, nil},
		{"talkers while starting", "/page/talkers", fake{state: "starting"}, 503, []string{"the gateway is starting"}, nil},
		{"user", "/page/user?user=bob", fake{}, 200, []string{
			"s-1", "live since 2026-11-28 13:56:09 UTC", "5,000", `data-user="bob" data-session="s-1" disabled`, "2.0 KiB wait to be read",
			"Kick all 2", "g-2", "s-3",
		}, []string{"Redis"}},
		{"user who is nowhere", "/page/user?user=nobody", fake{}, 200, []string{"has no session on this gateway", "Redis names no other"}, []string{"kick"}},
		{"user, without Redis", "/page/user?user=redis+away", fake{}, 200, []string{"Redis does not say where else: i/o timeout"}, nil},
		{"no user", "/page/user", fake{}, 200, []string{"name a user"}, nil},
		{"bad user", "/page/user?user=bad", fake{}, 200, []string{"user_id: not one"}, nil},
		{"no metrics", "/", fake{down: true}, 503, []string{"the metrics cannot be read"}, nil},
		{"no metrics, live", "/page/live", fake{down: true}, 503, []string{"the metrics cannot be read"}, nil},
		{"style", "/page/style.css", fake{}, 200, []string{"--accent"}, nil},
		{"script", "/page/script.js", fake{}, 200, []string{"page/live"}, nil},
		{"icon", "/page/icon.svg", fake{}, 200, []string{"<svg"}, nil},
		{"nothing", "/page/other", fake{}, 404, nil, nil},
		{"templates", "/page/templates/page.html", fake{}, 404, nil, nil},
		{"upwards", "/page/../page.go", fake{}, 307, nil, []string{"package"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := get(t, &tc.fake, tc.path)
			body := w.Body.String()
			if w.Code != tc.status {
				t.Errorf("status %d, want %d", w.Code, tc.status)
			}
			for _, want := range tc.want {
				if !strings.Contains(body, want) {
					t.Errorf("it lacks %q", want)
				}
			}
			for _, not := range append(tc.not, "<script>alert", "ZgotmplZ", "<no value>") {
				if strings.Contains(body, not) {
					t.Errorf("it has %q", not)
				}
			}
			if t.Failed() {
				t.Log(body)
			}
			h := w.Header()
			if p := h.Get("Content-Security-Policy"); !strings.Contains(p, "default-src 'none'") || strings.Contains(p, "unsafe") {
				t.Errorf("policy %q", p)
			}
			if h.Get("X-Content-Type-Options") != "nosniff" || (tc.status == 200 && h.Get("Cache-Control") != "no-store") || h.Get("Referrer-Policy") != "no-referrer" {
				t.Errorf("headers %v", h)
			}
		})
	}
}

// TestNothingInline: the policy forbids scripts, handlers and styles in the page and what others serve, so
// the page would be broken by them.
func TestNothingInline(t *testing.T) {
	forbidden := map[string]*regexp.Regexp{
		"an inline handler":     regexp.MustCompile(`(?i)\son[a-z]+\s*=\s*["']`),
		"an inline style":       regexp.MustCompile(`(?i)\sstyle\s*=|<style`),
		"an inline script":      regexp.MustCompile(`(?i)<script[^>]*>[^<]`),
		"another host's file":   regexp.MustCompile(`(?i)(src|href|url\(|import|fetch\()\s*[=(]?\s*["']?(https?:)?//`),
		"code made of strings":  regexp.MustCompile(`\beval\(|new Function|innerHTML\s*=|insertAdjacentHTML|document\.write`),
		"a route from the root": regexp.MustCompile(`(src|href|action)="/`), // a proxy may serve the page below a path
	}
	var seen []string
	err := fs.WalkDir(files, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(files, path)
		for what, re := range forbidden {
			if found := re.Find(b); found != nil {
				t.Errorf("%s has %s: %s", path, what, found)
			}
		}
		seen = append(seen, path)
		return err
	})
	if err != nil || len(seen) < 7 || !slices.Contains(seen, "static/script.js") {
		t.Errorf("looked at %v: %v", seen, err)
	}
}

// TestScriptFindsItsElements: what the script looks up by id stands in the page.
func TestScriptFindsItsElements(t *testing.T) {
	script := get(t, &fake{}, "/page/script.js").Body.String()
	page := get(t, &fake{state: "ready", acting: true}, "/").Body.String()
	ids := regexp.MustCompile(`\$\("([a-z-]+)"\)`).FindAllStringSubmatch(script, -1)
	if len(ids) < 15 {
		t.Errorf("only %d elements are looked up", len(ids))
	}
	for _, id := range ids {
		if !strings.Contains(page, `id="`+id[1]+`"`) {
			t.Errorf("there is no element %s", id[1])
		}
	}
}

func TestFormat(t *testing.T) {
	for _, tc := range []struct{ got, want string }{
		{count(0), "0"}, {count(999), "999"}, {count(1000), "1,000"}, {count(1234567), "1,234,567"}, {count(-1000), "-1,000"}, {count(-100), "-100"},
		{size(0), "0 B"}, {size(1023), "1023 B"}, {size(1536), "1.5 KiB"}, {size(200 << 20), "200 MiB"}, {size(1 << 50), "1024 TiB"},
		{amount(2048, "bytes"), "2.0 KiB"}, {amount(2048, "records"), "2,048"},
		{span(5, 1), "0 s"}, {span(0, 59_999), "59 s"}, {span(0, 61_000), "1 min 1 s"}, {span(0, 3_600_000), "1 h 0 min"}, {span(0, 90_000_000), "1 d 1 h"},
		{rate(1, 3000), "0.3"}, {rate(300_000, 1000), "300,000"}, {rate(5, 0), "5,000"}, {sizeRate(6000, 3000), "2.0 KiB"}, {seconds(3004), "3.0"},
		{percent(0, 0), ""}, {percent(0, 5), ""}, {percent(5, 5), "100.0 %"}, {percent(1, 100_000), "< 0.1 %"}, {percent(99_999, 100_000), "> 99.9 %"},
		{full(0, 0), "ok"}, {full(49, 100), "ok"}, {full(50, 100), "high"}, {full(90, 100), "full"},
	} {
		if tc.got != tc.want {
			t.Errorf("%q, want %q", tc.got, tc.want)
		}
	}
	if e := ends(map[string]int64{"b": 1, "a": 1, "none": 0, "c": 7}); len(e) != 3 || e[0].Name != "c" || e[1].Name != "a" {
		t.Errorf("ends %v", e)
	}
}
