package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tidwall/gjson"

	"im-gateway/bench/fleet"
	"im-gateway/bench/report"
)

// Hooks tell the caller of Run how far it is; nil ones are left out. They are called from Run's
// goroutine, in time, so that the caller can mark the server's CPU.
type Hooks struct {
	Phase    func(what string)      // "connect", "load", "settle", "verify"
	Ready    func() error           // everybody is connected; returns when the load may begin
	Measure  func(stage int)        // the measured time of a stage begins
	Measured func(stage int)        // and ends
	Progress func(p report.Point)   // every second of a stage
	Connect  func(up int, want int) // every second while connecting
	Rested   func(users int) error  // idle: so many users are connected and at rest
}

// scenario is what a run does with its connected users. All methods but verify run on the loop.
type scenario interface {
	begin(m *meter)                                     // a stage begins
	send(due int64)                                     // one scheduled event, open loop
	frame(u *user, payload []byte, now int64)           // any frame behind `connected`
	turn(u *user, now int64)                            // after the frames of one read
	lost(u *user, code int, err error, now time.Time)   // a connection that was up has ended
	refused(u *user, err error)                         // a connection did not come to be, under load
	outstanding() int64                                 // what settle waits for
	verify(ctx context.Context, r *run) (counts, error) // off the loop, when the loop is idle
}

type counts []report.Count

// kind is what there is to know of a scenario before it runs.
type kind struct {
	plain      bool // the servers say no `connected`
	needsKafka bool
	make       func(r *run) scenario
	run        func(ctx context.Context, r *run) ([]*report.Report, error) // nil: connect, load, settle, verify
}

var scenarios = map[string]kind{}

// Scenarios are the names that Options.Scenario may have.
func Scenarios() []string { return slices.Sorted(maps.Keys(scenarios)) }

// run is one run. All but o, f and hooks belongs to the loop.
type run struct {
	o     Options
	hooks Hooks
	f     *fleet.Fleet
	sc    scenario
	kafka *kafka // nil without brokers

	tokens   []string
	users    []user
	gateways []string // ids by URL, from `connected`
	up       int
	failed   int
	firstErr error
	loading  bool // connections are made and lost by the scenario
	l        ledger
	m        *meter
	b        breaches
	rng      *rand.Rand
	content  string
	buf, out []byte
	connects *track
	pacing   atomic.Bool
}

// user is one simulated user.
type user struct {
	n     int
	name  string
	conn  *fleet.Conn // nil: not connected
	up    bool        // `connected` has come
	owed  int         // closed loop: messages to send at the end of the turn
	seen  int64       // highest number of a push that came
	group int

	// Of users that come and go.
	left   time.Time // when
	url    int       // where to next
	hinted bool
	retry  time.Duration
}

// Run does one run and returns a report for each stage. The reports hold no values and no server
// processes: the caller adds the processes and calls Values. A broken invariant is a failed check
// in the report, not an error.
func Run(ctx context.Context, o Options, h Hooks) ([]*report.Report, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("options:\n%w", err)
	}
	tokens, err := o.Tokens.all(&o)
	if err != nil {
		return nil, err
	}
	r := &run{
		o: o, hooks: h, tokens: tokens, users: make([]user, o.Users), gateways: make([]string, len(o.URLs)),
		l: ledger{run: o.Run}, rng: rand.New(rand.NewPCG(1, 2)), content: strings.Repeat("x", o.Size.Max),
	}
	for n := range r.users {
		r.users[n] = user{n: n, name: o.user(n), seen: -1}
	}
	r.newMeter(time.Now())
	k := scenarios[o.Scenario]
	if len(o.Kafka) > 0 {
		if r.kafka, err = dialKafka(ctx, &o); err != nil {
			return nil, err
		}
		defer r.kafka.close()
	}
	r.sc = k.make(r)
	r.f, err = fleet.New(fleet.Options{
		URLs: o.URLs, Sources: o.Sources, Dialers: o.Dialers, Handler: r,
		Token: func(n int) string { return tokens[n] },
	})
	if err != nil {
		return nil, err
	}
	if err := r.f.Start(); err != nil {
		return nil, err
	}
	defer r.f.Stop() //nolint:errcheck // nothing is left to lose
	if k.run != nil {
		return k.run(ctx, r)
	}
	return r.standard(ctx)
}

func (r *run) newMeter(start time.Time) {
	r.m = newMeter(start, r.o.Warmup, r.o.Duration)
	r.connects = r.m.track("connected", true)
}

// standard connects everybody, then loads, settles and verifies each stage.
func (r *run) standard(ctx context.Context) ([]*report.Report, error) {
	if err := r.connectAll(ctx, len(r.users)); err != nil {
		return nil, err
	}
	if r.hooks.Ready != nil {
		if err := r.hooks.Ready(); err != nil {
			return nil, err
		}
	}
	var reports []*report.Report
	for i, rate := range r.o.Rates {
		rep, err := r.stage(ctx, i, rate)
		if err != nil {
			return reports, err
		}
		reports = append(reports, rep)
	}
	return reports, nil
}

// connectAll connects users up to number n and waits for their `connected`.
func (r *run) connectAll(ctx context.Context, n int) error {
	r.phase(phaseConnect)
	start := time.Now()
	from := 0
	r.f.DoWait(func() {
		for from < n && r.users[from].conn != nil {
			from++
		}
	})
	go func() {
		for k := from; k < n && ctx.Err() == nil; k++ {
			due := time.Now()
			if r.o.ConnectRate > 0 {
				due = start.Add(time.Duration(float64(k-from) / r.o.ConnectRate * float64(time.Second)))
				if !sleepUntil(ctx, due) {
					return
				}
			}
			r.f.Connect(k, due)
		}
	}()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	shown, last, lastUp := start, start, -1
	for {
		var up, failed int
		var first error
		r.f.DoWait(func() { up, failed, first = r.up, r.failed, r.firstErr })
		if up >= n {
			return nil
		}
		if failed > 0 {
			return fmt.Errorf("connect %d users: %d are connected, %d failed, the first with: %w", n, up, failed, first)
		}
		if up != lastUp {
			last, lastUp = time.Now(), up
		}
		if time.Since(last) > r.o.Settle+10*time.Second {
			return fmt.Errorf("connect %d users: %d are connected, and no more came for %s", n, up, time.Since(last).Round(time.Second))
		}
		if time.Since(shown) > time.Second && r.hooks.Connect != nil {
			shown = time.Now()
			r.hooks.Connect(up, n)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *run) phase(what string) {
	if r.hooks.Phase != nil {
		r.hooks.Phase(what)
	}
}

func sleepUntil(ctx context.Context, t time.Time) bool {
	d := time.Until(t)
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// stage is one rate for warm-up and measured time, then the wait for what is outstanding.
func (r *run) stage(ctx context.Context, n int, rate Rate) (*report.Report, error) {
	if r.kafka != nil {
		if err := r.kafka.mark(ctx); err != nil {
			return nil, err
		}
	}
	r.phase(phaseLoad)
	start := time.Now()
	r.f.DoWait(func() {
		r.newMeter(start)
		r.loading = true
		r.sc.begin(r.m)
	})
	if err := r.load(ctx, n, start, rate); err != nil {
		return nil, err
	}
	r.phase(phaseSettle)
	left := r.settle(ctx)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	r.phase(phaseVerify)
	more, err := r.sc.verify(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	var rep *report.Report
	r.f.DoWait(func() {
		if left > 0 {
			r.b.add("everything sent was answered", "%d had no answer after %s", left, r.o.Settle)
		}
		rep = r.report(start, r.o.Duration)
		rep.Options["rate"] = rate.String()
		if r.o.Window > 0 {
			rep.Options["rate"] = fmt.Sprintf("%d outstanding per user", r.o.Window)
		}
		rep.Counts = append(rep.Counts, more...)
		r.l.forget()
		r.b = breaches{}
	})
	if rep == nil {
		return nil, errors.New("the client loop ended")
	}
	return rep, nil
}

// load keeps the schedule, or the window, until its end.
func (r *run) load(ctx context.Context, n int, start time.Time, rate Rate) error {
	s := schedule{rate: rate, warmup: r.o.Warmup, length: r.o.Duration}
	end := start.Add(s.total())
	if r.o.Window > 0 {
		r.f.DoWait(func() {
			r.pacing.Store(true)
			for i := range r.users {
				r.users[i].owed = r.o.Window
				r.sc.turn(&r.users[i], start.UnixNano())
			}
		})
		defer r.pacing.Store(false)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var sent int64 // on the loop
	var busy atomic.Bool
	second := start.Add(time.Second)
	measuring, measured := start.Add(r.o.Warmup), false
	for {
		now := time.Now()
		if !measured && !now.Before(measuring) {
			measured = true
			if r.hooks.Measure != nil {
				r.hooks.Measure(n)
			}
		}
		if r.o.Window == 0 && busy.CompareAndSwap(false, true) {
			due := s.count(now.Sub(start))
			r.f.Do(func() {
				for ; sent < due; sent++ {
					r.sc.send(start.Add(s.due(sent)).UnixNano())
				}
				busy.Store(false)
			})
		}
		if !now.Before(second) {
			second = second.Add(time.Second)
			r.tick(now)
		}
		if !now.Before(end) && !busy.Load() {
			if r.hooks.Measured != nil {
				r.hooks.Measured(n)
			}
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *run) tick(now time.Time) {
	var p report.Point
	r.f.DoWait(func() { p = r.m.tick(now) })
	if r.hooks.Progress != nil {
		r.hooks.Progress(p)
	}
}

// settle waits until nothing is outstanding, or Options.Settle has passed without progress, and
// returns what is left.
func (r *run) settle(ctx context.Context) int64 {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last, since := int64(-1), time.Now()
	for {
		var left int64
		r.f.DoWait(func() { left = r.sc.outstanding() })
		if left != last {
			last, since = left, time.Now()
		}
		if left == 0 || time.Since(since) > r.o.Settle {
			return left
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return left
		}
	}
}

// report is what the loop knows of a stage.
func (r *run) report(start time.Time, length time.Duration) *report.Report {
	rep := &report.Report{
		Scenario: r.o.Scenario, Label: r.o.Label, Started: start, Seconds: length.Seconds(),
		Options: r.o.forReport(), Machine: report.ThisMachine(), Series: r.m.series,
	}
	for _, name := range r.m.names {
		t := r.m.tracks[name]
		if t.total == 0 {
			continue
		}
		rep.Counts = append(rep.Counts, report.Count{Name: name, N: t.total}, report.Count{Name: name + ", measured", N: t.measured})
		if t.hist != nil && t.hist.TotalCount() > 0 {
			rep.Latency = append(rep.Latency, report.NewLatency(name, t.hist))
		}
	}
	for _, name := range r.promises() {
		if k := r.b.count[name]; k > 0 {
			rep.Checks = append(rep.Checks, report.Check{Name: name, Detail: fmt.Sprintf("broken %d times, first: %s", k, r.b.first[name])})
		} else {
			rep.Checks = append(rep.Checks, report.Check{Name: name, OK: true})
		}
	}
	return rep
}

func (o *Options) forReport() map[string]any {
	m := map[string]any{
		"users": o.Users, "urls": o.URLs, "warmup": o.Warmup.String(), "duration": o.Duration.String(), "run": o.Run,
	}
	if o.Scenario != "idle" && o.Scenario != "connect" && o.Scenario != "churn" {
		m["size"] = o.Size.String()
	}
	if o.Scenario == "fanout" || o.Scenario == "chat" {
		m["group"] = o.Group.String()
	}
	if o.ConnectRate > 0 {
		m["connect_rate"] = o.ConnectRate
	}
	return m
}

// The promises that runs check, as they stand in reports.
const (
	keepsConnections = "no connection was lost"
	answersAll       = "everything sent was answered"
	answersOnce      = "every message was answered once"
	storesAcked      = "every acked message is in Kafka once, where the ack says"
	storesNoRefused  = "no refused message is in Kafka"
	storesInOrder    = "each user's messages are in Kafka in the order sent"
	storesOwn        = "every stored message carries its sender's name"
	pushesOnce       = "every push arrived once"
	pushesInOrder    = "pushes arrived in order"
	pushesToTarget   = "no push arrived at another user"
	comesBack        = "everybody who left came back"
	toldToGo         = "everybody was told to reconnect, and closed with 4002"
)

func (r *run) promises() []string {
	list := []string{keepsConnections, answersAll}
	switch r.o.Scenario {
	case "upstream", "chat", "soak":
		list = append(list, answersOnce)
		if r.kafka != nil {
			list = append(list, storesAcked, storesNoRefused, storesInOrder, storesOwn)
		}
	}
	switch r.o.Scenario {
	case "downstream", "fanout", "chat", "soak", "echo-load":
		list = append(list, pushesOnce, pushesInOrder, pushesToTarget)
	}
	switch r.o.Scenario {
	case "churn", "soak":
		list = append(list, comesBack)
	case "drain":
		list = append(list[:0], toldToGo, comesBack)
	}
	return list
}

// Upgraded, Message, Turn and Closed are the fleet's Handler.
func (r *run) Upgraded(c *fleet.Conn, now time.Time) {
	u := &r.users[c.User]
	u.conn = c
	if r.o.Plain || scenarios[r.o.Scenario].plain {
		r.isUp(u, c, now)
		if r.o.Hello != "" {
			_ = r.f.Write(c, fleet.AppendText(nil, []byte(r.o.Hello))) // a lost connection is told to Closed
		}
	}
}

// Message hands a frame to the scenario; the first one must be `connected`.
func (r *run) Message(c *fleet.Conn, payload []byte, now time.Time) {
	u := &r.users[c.User]
	if u.up {
		r.sc.frame(u, payload, now.UnixNano())
		return
	}
	if gjson.GetBytes(payload, "type").Str != "connected" {
		return // what a client sends without waiting may be answered before
	}
	if r.gateways[c.URL] == "" {
		r.gateways[c.URL] = strings.Clone(gjson.GetBytes(payload, "data.gateway_id").Str)
	}
	r.isUp(u, c, now)
}

// isUp counts a user as connected.
func (r *run) isUp(u *user, c *fleet.Conn, now time.Time) {
	u.up, u.hinted, u.url = true, false, c.URL
	r.up++
	r.m.took(r.connects, c.Begun.UnixNano(), now.UnixNano())
	if d, ok := r.sc.(*drain); ok && r.loading {
		d.returned(u, now.UnixNano())
	}
}

// Turn ends the frames of one read.
func (r *run) Turn(c *fleet.Conn, now time.Time) {
	if u := &r.users[c.User]; u.up {
		r.sc.turn(u, now.UnixNano())
	}
}

// Closed counts what was lost.
func (r *run) Closed(c *fleet.Conn, code int, err error, now time.Time) {
	u := &r.users[c.User]
	if !u.up {
		u.conn = nil
		if err == nil {
			err = fmt.Errorf("closed with %d before `connected`", code)
		}
		r.failed++
		if r.firstErr == nil {
			r.firstErr = err
		}
		if r.loading {
			r.sc.refused(u, err)
		}
		return
	}
	u.up, u.conn = false, nil
	r.up--
	r.sc.lost(u, code, err, now)
}

// lostAtAll is lost of scenarios in which no connection may end.
func (r *run) lostAtAll(u *user, code int, err error) {
	r.b.add(keepsConnections, "user %s: close code %d, %v", u.name, code, err)
}

// refusedAtAll is refused of scenarios in which no connection is made under load.
func (r *run) refusedAtAll(u *user, err error) { r.b.add(keepsConnections, "user %s: %v", u.name, err) }

func (r *run) size() int { return r.o.Size.draw(r.rng) }
