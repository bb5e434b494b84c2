package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/coder/websocket"
	"golang.org/x/sync/errgroup"
)

// UpstreamOptions describes a run of the upstream scenario. Zero values take the defaults named.
type UpstreamOptions struct {
	URL         string        // the gateway's WebSocket address; ws://127.0.0.1:8080/ws
	Secret      []byte        // HS256 secret by which tokens are made; required
	Users       int           // connected users, 1 to 15,000; 100
	Rate        float64       // messages per second of all users together, up to 1,000,000; 1,000
	Warmup      time.Duration // load that is not measured; 2 s
	Duration    time.Duration // load that is measured; 10 s
	Size        int           // bytes of content per message, up to 60,000; 128
	ConnectRate int           // connects in flight at once; 64
	AckWait     time.Duration // how long to wait for outstanding acks at the end; 15 s
}

func (o *UpstreamOptions) setDefaults() error {
	def(&o.URL, "ws://127.0.0.1:8080/ws")
	def(&o.Users, 100)
	def(&o.Rate, 1000)
	def(&o.Duration, 10*time.Second)
	def(&o.Size, 128)
	def(&o.ConnectRate, 64)
	def(&o.AckWait, 15*time.Second)
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	check(len(o.Secret) > 0, "secret: needed to make the users' tokens")
	check(o.Users >= 1 && o.Users <= 15000, "users: 1 to 15000")
	check(o.Rate > 0 && o.Rate <= 1e6, "rate: above 0, up to 1000000 per second")
	check(o.Duration > 0 && o.Warmup >= 0, "duration: above 0; warmup: not below 0")
	check(o.Size >= 1 && o.Size <= 60000, "size: 1 to 60000 bytes")
	return errors.Join(errs...)
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// UpstreamReport is what a run measured. Latencies are in microseconds, from the scheduled send
// time to the arrival of the ack, of successful acks within the measured time.
type UpstreamReport struct {
	Users     int              `json:"users"`
	Rate      float64          `json:"rate_per_second"`
	Seconds   float64          `json:"seconds"`
	Sent      int64            `json:"sent"`
	Acked     int64            `json:"acked"`
	Late      int64            `json:"acked_after_outcome_unknown"`
	Refused   map[string]int64 `json:"refused"`
	Unacked   int64            `json:"unacked"`
	Broken    []string         `json:"broken_invariants"`
	PerSecond float64          `json:"acked_per_second"`
	P50       int64            `json:"p50_us"`
	P90       int64            `json:"p90_us"`
	P99       int64            `json:"p99_us"`
	P999      int64            `json:"p999_us"`
	Max       int64            `json:"max_us"`
}

// ErrBroken is returned when a run saw an invariant broken; the report says which.
var ErrBroken = errors.New("an invariant was broken")

// Text is the report for people.
func (r *UpstreamReport) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "upstream: %d users, %.0f messages/s asked, %.1f s\n", r.Users, r.Rate, r.Seconds)
	fmt.Fprintf(&b, "  sent %d, acked %d (%.0f/s), refused %v, late %d, without answer %d\n",
		r.Sent, r.Acked, r.PerSecond, r.Refused, r.Late, r.Unacked)
	fmt.Fprintf(&b, "  ack latency ms: p50 %.2f  p90 %.2f  p99 %.2f  p99.9 %.2f  max %.2f\n",
		ms(r.P50), ms(r.P90), ms(r.P99), ms(r.P999), ms(r.Max))
	for _, s := range r.Broken {
		fmt.Fprintf(&b, "  BROKEN: %s\n", s)
	}
	return b.String()
}

func ms(us int64) float64 { return float64(us) / 1000 }

// upstreamRun is one run; its users share the counters and, under mu, the histogram.
type upstreamRun struct {
	opts    UpstreamOptions
	content string

	sent, acked, late atomic.Int64

	mu      sync.Mutex
	hist    *hdrhistogram.Histogram
	refused map[string]int64
	broken  []string
}

// upstreamUser is one connection. pending maps the name of each unanswered message to its
// scheduled send time and is shared by the sender and the reader.
type upstreamUser struct {
	run  *upstreamRun
	conn *websocket.Conn
	name string
	seq  int

	mu      sync.Mutex
	pending map[string]sentMessage
}

type sentMessage struct {
	at       time.Time
	measured bool
	unknown  bool
}

// Upstream connects the users, sends at the asked rate and waits for the acks. It returns the
// report also beside ErrBroken.
func Upstream(ctx context.Context, opts UpstreamOptions) (*UpstreamReport, error) {
	if err := opts.setDefaults(); err != nil {
		return nil, fmt.Errorf("upstream options:\n%w", err)
	}
	r := &upstreamRun{
		opts:    opts,
		content: strings.Repeat("x", opts.Size),
		hist:    hdrhistogram.New(1, 120_000_000, 3),
		refused: map[string]int64{},
	}
	users, err := r.connect(ctx)
	defer func() {
		for _, u := range users {
			if u != nil {
				_ = u.conn.CloseNow()
			}
		}
	}()
	if err != nil {
		return nil, err
	}
	readCtx, stopReading := context.WithCancel(ctx)
	var readers sync.WaitGroup
	for _, u := range users {
		readers.Go(func() { u.read(readCtx) })
	}
	err = r.send(ctx, users)
	unacked := r.awaitAcks(ctx, users)
	stopReading()
	readers.Wait()
	if err != nil {
		return nil, err
	}
	rep := r.report(unacked)
	if len(rep.Broken) > 0 {
		return rep, ErrBroken
	}
	return rep, nil
}

func (r *upstreamRun) connect(ctx context.Context) ([]*upstreamUser, error) {
	users := make([]*upstreamUser, r.opts.Users)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(r.opts.ConnectRate)
	for i := range users {
		g.Go(func() error {
			name := "bench-" + strconv.Itoa(i)
			token, err := SignToken(r.opts.Secret, name, 24*time.Hour)
			if err != nil {
				return err
			}
			conn, _, err := websocket.Dial(ctx, r.opts.URL, &websocket.DialOptions{
				Subprotocols: []string{"im.json.v1", "bearer." + token},
			})
			if err != nil {
				return fmt.Errorf("connect user %s to %s: %w", name, r.opts.URL, err)
			}
			users[i] = &upstreamUser{run: r, conn: conn, name: name, pending: map[string]sentMessage{}}
			if _, first, err := conn.Read(ctx); err != nil {
				return fmt.Errorf("first frame of user %s: %w", name, err)
			} else if f := parseFrame(first); f.Type != "connected" {
				return fmt.Errorf("first frame of user %s is %q, not connected", name, f.Type)
			}
			return nil
		})
	}
	return users, g.Wait()
}

// send keeps the schedule: message n is due at start + n/rate, whatever came before it.
func (r *upstreamRun) send(ctx context.Context, users []*upstreamUser) error {
	start := time.Now()
	end := start.Add(r.opts.Warmup + r.opts.Duration)
	interval := time.Duration(float64(time.Second) / r.opts.Rate)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := 0; ; n++ {
		due := start.Add(time.Duration(n) * interval)
		if due.After(end) {
			return nil
		}
		if wait := time.Until(due); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := users[n%len(users)].send(ctx, due, due.Sub(start) >= r.opts.Warmup); err != nil {
			return err
		}
	}
}

func (r *upstreamRun) awaitAcks(ctx context.Context, users []*upstreamUser) int64 {
	deadline := time.NewTimer(r.opts.AckWait)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var open int64
		for _, u := range users {
			open += u.unanswered()
		}
		if open == 0 {
			return 0
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return open
		case <-ctx.Done():
			return open
		}
	}
}

func (r *upstreamRun) report(unacked int64) *UpstreamReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	if unacked > 0 {
		r.broken = append(r.broken, fmt.Sprintf("%d messages got no answer within %s", unacked, r.opts.AckWait))
	}
	return &UpstreamReport{
		Users: r.opts.Users, Rate: r.opts.Rate, Seconds: r.opts.Duration.Seconds(),
		Sent: r.sent.Load(), Acked: r.acked.Load(), Late: r.late.Load(),
		Refused: r.refused, Unacked: unacked, Broken: r.broken,
		PerSecond: float64(r.hist.TotalCount()) / r.opts.Duration.Seconds(),
		P50:       r.hist.ValueAtQuantile(50), P90: r.hist.ValueAtQuantile(90),
		P99: r.hist.ValueAtQuantile(99), P999: r.hist.ValueAtQuantile(99.9), Max: r.hist.Max(),
	}
}

func (r *upstreamRun) breach(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.broken) < 20 {
		r.broken = append(r.broken, fmt.Sprintf(format, args...))
	}
}

func (u *upstreamUser) send(ctx context.Context, due time.Time, measured bool) error {
	u.seq++
	id := "b" + strconv.Itoa(u.seq)
	u.mu.Lock()
	u.pending[id] = sentMessage{at: due, measured: measured}
	u.mu.Unlock()
	frame := fmt.Appendf(nil, `{"type":"send-message","message_id":%q,"data":{"conversation_id":"bench","content":%q},"timestamp":%d}`,
		id, u.run.content, due.UnixMilli())
	if err := u.conn.Write(ctx, websocket.MessageText, frame); err != nil {
		return fmt.Errorf("send as user %s: %w", u.name, err)
	}
	u.run.sent.Add(1)
	return nil
}

func (u *upstreamUser) unanswered() int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return int64(len(u.pending))
}

type frame struct {
	Type string `json:"type"`
	Data struct {
		ClientMsgID string `json:"client_msg_id"`
		Status      string `json:"status"`
		Code        string `json:"code"`
	} `json:"data"`
}

func parseFrame(b []byte) (f frame) {
	if err := json.Unmarshal(b, &f); err != nil {
		f.Type = "unreadable"
	}
	return f
}

func (u *upstreamUser) read(ctx context.Context) {
	for {
		_, b, err := u.conn.Read(ctx)
		if err != nil {
			if ctx.Err() == nil && u.unanswered() > 0 {
				u.run.breach("user %s lost its connection with messages unanswered: %v", u.name, err)
			}
			return
		}
		if f := parseFrame(b); f.Type == "message-ack" {
			u.answered(f, time.Now())
		}
	}
}

func (u *upstreamUser) answered(f frame, now time.Time) {
	u.mu.Lock()
	m, open := u.pending[f.Data.ClientMsgID]
	unknown := f.Data.Status != "success" && f.Data.Code == "OUTCOME_UNKNOWN"
	if open && unknown {
		m.unknown = true // a late success may follow
		u.pending[f.Data.ClientMsgID] = m
	} else {
		delete(u.pending, f.Data.ClientMsgID)
	}
	u.mu.Unlock()
	switch {
	case !open:
		u.run.breach("user %s got a second or unasked answer for %q", u.name, f.Data.ClientMsgID)
	case f.Data.Status != "success":
		u.run.mu.Lock()
		u.run.refused[f.Data.Code]++
		u.run.mu.Unlock()
	default:
		u.run.acked.Add(1)
		if m.unknown {
			u.run.late.Add(1)
		}
		if m.measured {
			u.run.mu.Lock()
			_ = u.run.hist.RecordValue(max(1, now.Sub(m.at).Microseconds())) // out of range: 2 min, past every deadline
			u.run.mu.Unlock()
		}
	}
}
