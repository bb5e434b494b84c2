package engine

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func attempt(a *API, path, from, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/api/auth/"+path, strings.NewReader(body))
	r.RemoteAddr = from
	w := httptest.NewRecorder()
	a.ServeHTTP(w, r)
	return w
}

func TestLoginLimits(t *testing.T) {
	auth := &fakeAuth{calls: make(chan string, 64)}
	a := testAPI(t, auth, func(o *APIOptions) { o.Settings.Logins = LoginLimits{PerIP: 3, PerName: 2} })
	login := func(from, name string) int {
		return attempt(a, "login", from, fmt.Sprintf(`{"username":%q,"password":"wrong"}`, name)).Code
	}
	refused := func(w *httptest.ResponseRecorder, within int) {
		t.Helper()
		after, err := strconv.Atoi(w.Header().Get("Retry-After"))
		if w.Code != 429 || !strings.Contains(w.Body.String(), `"RATE_LIMITED"`) || err != nil || after < 1 || after > within {
			t.Errorf("%d %s, Retry-After %q; want 429 within %d s", w.Code, w.Body, w.Header().Get("Retry-After"), within)
		}
	}
	// By name, from different addresses and in different case; the name's owner waits, others do not.
	if one, two := login("192.0.2.1:1", "alice"), login("192.0.2.2:1", "Alice "); one != 401 || two != 401 {
		t.Fatalf("the first attempts: %d, %d", one, two)
	}
	refused(attempt(a, "login", "192.0.2.3:1", `{"username":"ALICE","password":"right"}`), 30)
	refused(attempt(a, "register", "192.0.2.3:1", `{"username":"alice","password":"x"}`), 30)
	if code := login("192.0.2.3:1", "bob"); code != 401 {
		t.Errorf("another name: %d", code)
	}
	// By address, on all routes together; IPv6 by network.
	refused(attempt(a, "guest", "192.0.2.3:9", `{"guestName":"g"}`), 20)
	refused(attempt(a, "guest", "[::ffff:192.0.2.3]:9", `{"guestName":"g"}`), 20)
	for i := range 3 {
		if code := login(fmt.Sprintf("[2001:db8::%d]:1", i), fmt.Sprint("n", i)); code != 401 {
			t.Errorf("attempt %d over IPv6: %d", i, code)
		}
	}
	refused(attempt(a, "guest", "[2001:db8::ffff]:1", `not even JSON`), 20)
	if code := login("[2001:db8:0:1::1]:1", "n9"); code != 401 {
		t.Errorf("another /64: %d", code)
	}
	// What needs a token already is not an attempt.
	for range 5 {
		if w := attempt(a, "refresh", "192.0.2.3:1", `{"refreshToken":"r"}`); w.Code != 200 {
			t.Errorf("refresh: %d", w.Code)
		}
	}
	close(auth.calls)
	calls := 0
	for range auth.calls {
		calls++
	}
	if calls != 7 {
		t.Errorf("im-logic was called %d times, want 7", calls)
	}
	if ip, name := testutil.ToFloat64(a.logins.perIP.refused), testutil.ToFloat64(a.logins.perName.refused); ip != 3 || name != 2 {
		t.Errorf("counted %v by address and %v by name, want 3 and 2", ip, name)
	}
}

func TestAttemptsRefill(t *testing.T) {
	a := newAttempts(60, 4, prometheus.NewCounter(prometheus.CounterOpts{Name: "r"}), prometheus.NewCounter(prometheus.CounterOpts{Name: "f"}))
	now := time.Unix(1e9, 0)
	for range 60 {
		if _, ok := a.take("k", now); !ok {
			t.Fatal("refused within the limit")
		}
	}
	wait, ok := a.take("k", now)
	if ok || wait <= 0 || wait > time.Second {
		t.Errorf("one more: %t, wait %s", ok, wait)
	}
	if _, ok := a.take("k", now.Add(wait)); !ok {
		t.Error("refused after the wait that was asked for")
	}
	if _, ok := a.take("k", now.Add(wait)); ok {
		t.Error("two for one wait")
	}
	// The table is bounded: the key that was used longest ago is forgotten, and counted.
	for i := range 100 {
		a.take(fmt.Sprint(i), now)
		if i%3 == 0 {
			a.take("k", now)
		}
	}
	if n := a.buckets.Len(); n != 4 {
		t.Errorf("%d keys are held", n)
	}
	if n := testutil.ToFloat64(a.forgotten); n != 97 {
		t.Errorf("%v forgotten, want 97", n)
	}
	if _, ok := a.take("k", now); ok {
		t.Error("a key in use was forgotten")
	}
	off := newAttempts(0, 4, a.refused, a.forgotten)
	for range 1000 {
		if _, ok := off.take("k", now); !ok {
			t.Fatal("refused without a limit")
		}
	}
}

func TestAttemptsLimitChanges(t *testing.T) {
	a := newAttempts(10, 4, prometheus.NewCounter(prometheus.CounterOpts{Name: "r"}), prometheus.NewCounter(prometheus.CounterOpts{Name: "f"}))
	allowed := func() (n int) {
		now := time.Now() // set looks at the clock
		for n < 1000 {
			if _, ok := a.take("k", now); !ok {
				return n
			}
			n++
		}
		return n
	}
	if n := allowed(); n != 10 {
		t.Errorf("%d attempts, want 10", n)
	}
	a.set(20) // nothing is given back
	if n := allowed(); n > 1 {
		t.Errorf("%d attempts right after the limit was raised", n)
	}
	a.set(0)
	if n := allowed(); n != 1000 {
		t.Errorf("%d attempts without a limit", n)
	}
	a.set(60)
	if n := allowed(); n != 60 {
		t.Errorf("%d attempts, want 60", n)
	}
	a.set(600)
	a.take("other", time.Now())
	a.set(5)
	for i := range 6 {
		if _, ok := a.take("other", time.Now()); ok != (i < 5) {
			t.Errorf("attempt %d after the limit was lowered to 5: %t", i, ok)
		}
	}
}

func TestAddressKey(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1": "192.0.2.1", "::ffff:192.0.2.1": "192.0.2.1",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::", "fe80::1%eth0": "fe80::",
	} {
		if got := addressKey(netip.MustParseAddr(in)); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	_ = addressKey(netip.Addr{}) // of a request without one
}
