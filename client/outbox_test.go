package client

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// box is an outbox with messages m1 to mN.
func box(t *testing.T, window, n int) *outbox {
	t.Helper()
	var o outbox
	o.init(n, window, 30*time.Second)
	for _, id := range ids(1, n) {
		p, err := newPending(Envelope{Type: "x", ID: id}, JSON)
		if err != nil {
			t.Fatal(err)
		}
		p.outbox = &o
		if err := o.add(p); err != nil {
			t.Fatal(err)
		}
	}
	return &o
}

// expect asserts that id is to be sent now; empty: nothing is. It returns the time to wait.
func (o *outbox) expect(t *testing.T, id string) time.Duration {
	t.Helper()
	b, wait, err := o.next(0, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	if got := string(b); (id == "") != (got == "") || !strings.Contains(got, id) {
		t.Fatalf("sends %q, want %q", got, id)
	}
	return wait
}

func (o *outbox) refuse(id, code string, after int64) {
	o.answer(ack{ClientMsgID: id, Status: "error", Code: code, RetryAfterMs: after})
}

func (o *outbox) success(id string) { o.answer(ack{ClientMsgID: id, Status: "success"}) }

func TestRetryTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := box(t, 1, 2)
		o.expect(t, "m1")
		o.refuse("m1", "OVERLOADED", 250)
		if d := o.expect(t, ""); d < 250*time.Millisecond || d > 301*time.Millisecond {
			t.Errorf("waits %s, was told 250ms", d)
		}
		time.Sleep(301 * time.Millisecond)
		o.expect(t, "m1")
		o.refuse("m1", "OUTCOME_UNKNOWN", 0)
		if d := o.expect(t, ""); d < unknownWait || d > 2*unknownWait {
			t.Errorf("waits %s for a late success", d)
		}
		time.Sleep(2 * unknownWait)
		o.expect(t, "m1")
		for want := 500 * time.Millisecond; want < 20*time.Second; want *= 2 {
			o.refuse("m1", "BROKER_UNAVAILABLE", 0)
			o.refuse("m1", "BROKER_UNAVAILABLE", 0) // once is enough
			base := min(want, 10*time.Second)
			d := o.expect(t, "")
			if d < base/2 || d > base*3/2 {
				t.Errorf("waits %s, want about %s", d, base)
			}
			time.Sleep(d)
			o.expect(t, "m1")
		}
		o.success("m1")
		o.success("m1")
		o.expect(t, "m2")
		o.refuse("m2", "RATE_LIMITED", 0)
		if d := o.expect(t, ""); d > 750*time.Millisecond {
			t.Errorf("waits %s after a success", d)
		}
		o.success("m2") // late
		if d := o.expect(t, ""); d != forever || o.outstanding != 0 || o.refused != 0 || len(o.byID) != 0 {
			t.Errorf("not empty: waits %s, %d outstanding, %d refused", d, o.outstanding, o.refused)
		}
	})
}

// After a refusal a wide window drains, then goes on one by one until the refused are settled.
func TestWindowAfterRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := box(t, 3, 7)
		for _, id := range ids(1, 3) {
			o.expect(t, id)
		}
		o.refuse("m1", "OVERLOADED", 1)
		time.Sleep(2 * time.Millisecond)
		o.expect(t, "") // m2 and m3 are outstanding
		o.success("m2")
		o.expect(t, "")
		o.refuse("m3", "OVERLOADED", 1)
		time.Sleep(2 * time.Millisecond)
		o.expect(t, "m1")
		o.expect(t, "")
		o.refuse("m1", "OVERLOADED", 5)
		o.expect(t, "") // m3 may go by its own time, but not before m1
		time.Sleep(7 * time.Millisecond)
		o.expect(t, "m1")
		o.success("m1")
		o.expect(t, "m3")
		o.expect(t, "")
		o.success("m3")
		for _, id := range ids(4, 6) {
			o.expect(t, id)
		}
		o.expect(t, "")
	})
}

func TestLeaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := box(t, 2, 4)
		leave := time.Now().Add(time.Second)
		for range 2 {
			if b, _, err := o.next(0, leave); b == nil || err != nil {
				t.Fatalf("sends nothing before the time, %v", err)
			}
		}
		if _, d, err := o.next(0, leave); d != time.Second || err != nil {
			t.Errorf("waits %s, %v", d, err)
		}
		o.success("m1")
		time.Sleep(time.Second)
		if b, d, err := o.next(0, leave); b != nil || d != leaveGrace || err != nil {
			t.Errorf("sends %q, waits %s for what is outstanding, %v", b, d, err)
		}
		time.Sleep(leaveGrace)
		if _, _, err := o.next(0, leave); !errors.Is(err, errMoved) {
			t.Errorf("still there: %v", err)
		}
		o.restart()
		o.expect(t, "m2")
		o.expect(t, "m3")
		o.success("m2")
		o.success("m3")
		if _, _, err := o.next(0, leave); !errors.Is(err, errMoved) {
			t.Errorf("nothing is outstanding: %v", err)
		}
	})
}

func TestAckTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := box(t, 2, 3)
		o.expect(t, "m1")
		time.Sleep(time.Second)
		o.expect(t, "m2")
		if d := o.expect(t, ""); d != 29*time.Second {
			t.Errorf("waits %s", d)
		}
		o.success("m1")
		o.expect(t, "m3")
		time.Sleep(30 * time.Second)
		if _, _, err := o.next(0, time.Time{}); !errors.Is(err, errNoAnswer) {
			t.Errorf("waits on: %v", err)
		}
	})
}
