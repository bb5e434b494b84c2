package bench

import (
	"context"
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"github.com/tidwall/gjson"

	"im-gateway/bench/report"
)

func init() {
	scenarios["drain"] = kind{make: func(r *run) scenario { return &drain{r: r} }, run: runDrain}
}

const closeDraining = 4002

// drain ends one of the gateways and watches its clients come back elsewhere, as its hints say.
type drain struct {
	r           *run
	m           *meter
	hinted, cut *track
	back        *track
	moved       int64 // clients that were told to go and are not back yet
	refusedOnce *track
}

func (s *drain) begin(m *meter) {
	s.m = m
	s.hinted, s.cut = m.track("told to reconnect", false), m.track("closed with 4002", false)
	s.back = m.track("back", true)
	s.refusedOnce = m.track("connects refused", false)
}

func (s *drain) send(int64) {}

func (s *drain) frame(u *user, payload []byte, now int64) {
	f := gjson.Parse(unsafe.String(unsafe.SliceData(payload), len(payload))) // the view is not kept
	if f.Get("type").Str == "reconnect" {
		u.retry = time.Duration(f.Get("data.retry_after_ms").Int()) * time.Millisecond
		u.hinted = true
		s.m.count(s.hinted, now)
	}
}

func (s *drain) turn(*user, int64) {}

// lost sends the client on to the next gateway after the time that the hint gave.
func (s *drain) lost(u *user, code int, err error, now time.Time) {
	s.moved++
	if code == closeDraining {
		s.m.count(s.cut, now.UnixNano())
	}
	if !u.hinted || code != closeDraining {
		s.r.b.add(toldToGo, "user %s: hint %v, close code %d, %v", u.name, u.hinted, code, err)
	}
	u.left = now
	s.again(u, u.retry)
}

func (s *drain) again(u *user, after time.Duration) {
	u.url = (u.url + 1) % len(s.r.o.URLs)
	n, url, left := u.n, u.url, u.left
	time.AfterFunc(after, func() { s.r.f.ConnectTo(n, url, left) })
}

func (s *drain) refused(u *user, _ error) {
	s.m.count(s.refusedOnce, time.Now().UnixNano())
	s.again(u, time.Second)
}

func (s *drain) returned(u *user, now int64) {
	s.m.took(s.back, u.left.UnixNano(), now)
	s.moved--
}

func (s *drain) outstanding() int64 { return int64(len(s.r.users) - s.r.up) }

func (s *drain) verify(context.Context, *run) (counts, error) { return nil, nil }

// runDrain connects everybody, tells the gateway of Options.DrainPID to end, or waits for somebody
// to do so, and reports when everybody is back or Options.Duration and Settle have passed.
func runDrain(ctx context.Context, r *run) ([]*report.Report, error) {
	if err := r.connectAll(ctx, len(r.users)); err != nil {
		return nil, err
	}
	if r.hooks.Ready != nil {
		if err := r.hooks.Ready(); err != nil {
			return nil, err
		}
	}
	r.phase(phaseLoad)
	start := time.Now()
	sc := r.sc.(*drain)
	r.f.DoWait(func() {
		r.newMeter(start)
		r.m.from, r.m.to = start.UnixNano(), start.Add(time.Hour).UnixNano()
		r.loading = true
		sc.begin(r.m)
	})
	if r.hooks.Measure != nil {
		r.hooks.Measure(0)
	}
	if pid := r.o.DrainPID; pid > 0 {
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			return nil, fmt.Errorf("end process %d: %w", pid, err)
		}
	}
	left := int64(len(r.users))
	for end := start.Add(r.o.Duration + r.o.Settle); time.Now().Before(end); {
		if !sleepUntil(ctx, time.Now().Add(time.Second)) {
			return nil, ctx.Err()
		}
		r.tick(time.Now())
		var gone int64
		r.f.DoWait(func() { left, gone = sc.outstanding(), sc.cut.total })
		if gone > 0 && left == 0 && time.Since(start) > r.o.Warmup {
			break
		}
	}
	if r.hooks.Measured != nil {
		r.hooks.Measured(0)
	}
	var rep *report.Report
	r.f.DoWait(func() {
		if left > 0 {
			r.b.add(comesBack, "%d users are not back", left)
		}
		rep = r.report(start, time.Since(start))
	})
	return []*report.Report{rep}, nil
}
