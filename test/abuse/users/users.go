// Package users is the well-behaved side of the abuse suite: users who each send a message every few
// seconds, wait for its ack and send it again when they are asked to, and are pushed records from Kafka.
// One process runs all of them on one event loop.
package users

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/bench/fleet"
)

// Options describe the users of one process. They are sent to it as JSON.
type Options struct {
	URL    string   // ws:// or wss://
	Tokens []string // of user i; those behind Users are newcomers'
	Names  []string // as Tokens
	Users  int
	// Every is the time between two messages of a user, and between two records for one.
	Every time.Duration
	// A message without an answer after AckWithin, or a record that has not arrived after PushWithin, is lost.
	AckWithin, PushWithin time.Duration
	Broker                string
	Topic                 string // the gateway's downstream topic
}

// Window is what was seen between two calls of Window.
type Window struct {
	P50, P99, Max     time.Duration // from a message's first sending to its success
	PushP99           time.Duration // from a record's writing to its arrival
	Acks, Pushes      int
	SentAgain         map[string]int // refusals after which a message was sent again, by code
	Errors            map[string]int // lost acks, lost pushes, other refusals, closes, by what they are
	Newcomers         int            // users who came, were welcomed and left
	NewcomersRefused  map[string]int // by what they were told
	Outstanding, Open int            // at its end
}

const (
	newcomerEvery = 250 * time.Millisecond
	highest       = int64(time.Minute)
)

// Group are the users. Its fields belong to the fleet's loop.
type Group struct {
	o       Options
	fleet   *fleet.Fleet
	front   *front // nil without TLS
	kafka   *kgo.Client
	users   []user
	guest   int
	seq     int64
	pushes  map[int64]push
	acks    *hdrhistogram.Histogram
	arrived *hdrhistogram.Histogram
	now     Window
	quiet   bool // begins nothing new
	frame   []byte
}

type user struct {
	c        *fleet.Conn
	welcomed bool
	lost     bool // its connection ended, which has been counted
	name     string
	first    time.Time // of the outstanding message; zero: none
	sent     time.Time // when it was sent last
	again    time.Time // when it is to be sent again; zero: it waits for its ack
	next     time.Time
	push     time.Time // when it is pushed next
	seq      int
}

type push struct {
	user int
	at   time.Time
}

// Start connects the users and returns when all are welcome.
func Start(ctx context.Context, o Options) (*Group, error) {
	g := &Group{o: o, users: make([]user, o.Users), guest: o.Users, pushes: map[int64]push{}}
	g.forget()
	var sources []netip.Addr
	for i := range 250 { // each in a /24 of its own
		sources = append(sources, netip.AddrFrom4([4]byte{127, 2, byte(i), 1}))
	}
	var err error
	if strings.HasPrefix(o.URL, "wss://") {
		gateway, _, _ := strings.Cut(strings.TrimPrefix(o.URL, "wss://"), "/")
		if g.front, err = startFront(gateway); err != nil {
			return nil, err
		}
		o.URL = g.front.url(o.URL)
	}
	if g.kafka, err = kgo.NewClient(kgo.SeedBrokers(o.Broker), kgo.ProducerLinger(5*time.Millisecond)); err != nil {
		return nil, fmt.Errorf("users: kafka: %w", err)
	}
	g.fleet, err = fleet.New(fleet.Options{
		URLs: []string{o.URL}, Token: func(n int) string { return o.Tokens[n] }, Sources: sources, Dialers: 16, Handler: g,
	})
	if err == nil {
		err = g.fleet.Start()
	}
	if err != nil {
		g.kafka.Close()
		return nil, fmt.Errorf("users: %w", err)
	}
	for i := range o.Users {
		g.fleet.Connect(i, time.Now())
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		open, errs := 0, ""
		g.fleet.DoWait(func() {
			for i := range g.users {
				if g.users[i].welcomed {
					open++
				}
			}
			errs = fmt.Sprint(g.now.Errors)
		})
		if open == o.Users {
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("users: %d of %d are connected, errors: %s", open, o.Users, errs), g.Close())
		}
	}
	g.fleet.DoWait(func() {
		now := time.Now()
		for i := range g.users {
			u := &g.users[i]
			u.next = now.Add(rand.N(o.Every))
			u.push = now.Add(rand.N(o.Every))
		}
	})
	return g, nil
}

// Run keeps the users busy until ctx ends.
func (g *Group) Run(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	newcomer := time.NewTicker(newcomerEvery)
	defer newcomer.Stop()
	for {
		select {
		case <-tick.C:
			g.fleet.DoWait(func() { g.turn(time.Now()) })
		case <-newcomer.C:
			if n := g.newcomer(); n > 0 {
				g.fleet.Connect(n, time.Now())
			}
		case <-ctx.Done():
			return
		}
	}
}

func (g *Group) newcomer() (n int) {
	g.fleet.DoWait(func() {
		if g.quiet || g.guest == len(g.o.Tokens) {
			return
		}
		n = g.guest
		g.guest++
	})
	return n
}

// Window ends a window and begins the next. With settle it begins nothing new first, and waits until
// nothing is outstanding or has been so for too long, which is an error in the window.
func (g *Group) Window(settle bool) (w Window) {
	g.fleet.DoWait(func() { g.quiet = settle })
	for deadline := time.Now().Add(max(g.o.PushWithin, g.o.AckWithin) + time.Second); settle && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		n := 0
		g.fleet.DoWait(func() { n = g.outstanding() })
		if n == 0 {
			break
		}
	}
	g.fleet.DoWait(func() {
		w = g.now
		w.Outstanding = g.outstanding()
		for i := range g.users {
			if g.users[i].c != nil {
				w.Open++
			}
		}
		w.P50, w.P99 = time.Duration(g.acks.ValueAtQuantile(50)), time.Duration(g.acks.ValueAtQuantile(99))
		w.Max, w.PushP99 = time.Duration(g.acks.Max()), time.Duration(g.arrived.ValueAtQuantile(99))
		g.forget()
	})
	return w
}

// Close ends everything.
func (g *Group) Close() error {
	g.kafka.Close()
	err := g.fleet.Stop()
	if g.front != nil {
		err = errors.Join(err, g.front.close())
	}
	return err
}

func (g *Group) forget() {
	g.acks, g.arrived = hdrhistogram.New(1000, highest, 3), hdrhistogram.New(1000, highest, 3)
	g.now = Window{SentAgain: map[string]int{}, Errors: map[string]int{}, NewcomersRefused: map[string]int{}}
}

func (g *Group) outstanding() int {
	n := len(g.pushes)
	for i := range g.users {
		if !g.users[i].first.IsZero() {
			n++
		}
	}
	return n
}

// turn sends what is due; on the loop.
func (g *Group) turn(now time.Time) {
	for i := range g.users {
		u := &g.users[i]
		if u.c == nil {
			continue
		}
		switch {
		case !u.first.IsZero() && u.again.IsZero() && now.Sub(u.sent) > g.o.AckWithin:
			g.now.Errors["lost ack"]++
			u.first, u.again = time.Time{}, time.Time{}
		case !u.again.IsZero() && now.After(u.again):
			u.again = time.Time{}
			g.send(u, now)
		case u.first.IsZero() && now.After(u.next) && !g.quiet:
			u.seq++
			u.name = "m-" + strconv.Itoa(u.seq)
			u.first, u.next = now, u.next.Add(g.o.Every)
			if u.next.Before(now) { // it had to wait: it does not catch up
				u.next = now.Add(g.o.Every)
			}
			g.send(u, now)
		}
		if now.After(u.push) && !g.quiet {
			u.push = u.push.Add(g.o.Every)
			g.write(i, now)
		}
	}
	for id, p := range g.pushes {
		if now.Sub(p.at) > g.o.PushWithin {
			g.now.Errors["lost push"]++
			delete(g.pushes, id)
		}
	}
}

var padding = strings.Repeat("x", 100)

func (g *Group) send(u *user, now time.Time) {
	u.sent = now
	text := fmt.Appendf(nil, `{"type":"send-message","message_id":%q,"data":{"content":%q}}`, u.name, padding)
	g.frame = fleet.AppendText(g.frame[:0], text)
	_ = g.fleet.Write(u.c, g.frame) // Closed tells
}

// write stores a record for a user.
func (g *Group) write(i int, now time.Time) {
	g.seq++
	id := g.seq
	g.pushes[id] = push{user: i, at: now}
	value := fmt.Appendf(nil, `{"target_user_id":%q,"message_id":"p-%d","data":{"push":%d}}`, g.o.Names[i], id, id)
	r := &kgo.Record{Topic: g.o.Topic, Key: []byte(g.o.Names[i]), Value: value}
	g.kafka.Produce(context.Background(), r, func(_ *kgo.Record, err error) {
		if err != nil {
			g.fleet.Do(func() {
				delete(g.pushes, id)
				g.now.Errors["record not stored: "+err.Error()]++
			})
		}
	})
}

type frame struct {
	Type string `json:"type"`
	Data struct {
		ClientMsgID string `json:"client_msg_id"`
		Status      string `json:"status"`
		Code        string `json:"code"`
		RetryAfter  int    `json:"retry_after_ms"`
		Push        int64  `json:"push"`
	} `json:"data"`
}

// Message implements fleet.Handler.
func (g *Group) Message(c *fleet.Conn, payload []byte, now time.Time) {
	var f frame
	if err := json.Unmarshal(payload, &f); err != nil {
		g.now.Errors["unreadable frame"]++
		return
	}
	if c.User >= len(g.users) {
		if f.Type == "connected" {
			g.now.Newcomers++
			c.Mark = 1
			g.fleet.Close(c, nil)
		}
		return
	}
	u := &g.users[c.User]
	switch f.Type {
	case "connected":
		u.welcomed = true
	case "message-ack":
		g.acked(u, &f, now)
	case "new-message":
		if p, ok := g.pushes[f.Data.Push]; ok && p.user == c.User {
			delete(g.pushes, f.Data.Push)
			g.now.Pushes++
			_ = g.arrived.RecordValue(min(int64(now.Sub(p.at)), highest))
		}
	default:
		g.now.Errors["frame "+f.Type+" "+f.Data.Code]++
	}
}

func (g *Group) acked(u *user, f *frame, now time.Time) {
	if f.Data.ClientMsgID != u.name || u.first.IsZero() {
		return // late: it has been counted as lost
	}
	switch f.Data.Code {
	case "":
		g.now.Acks++
		_ = g.acks.RecordValue(min(int64(now.Sub(u.first)), highest))
		u.first = time.Time{}
	case "OVERLOADED", "RATE_LIMITED", "BROKER_UNAVAILABLE":
		g.now.SentAgain[f.Data.Code]++
		u.again = now.Add(time.Duration(max(f.Data.RetryAfter, 50)) * time.Millisecond)
	default:
		g.now.Errors["ack "+f.Data.Code]++
		u.first = time.Time{}
	}
}

// Upgraded implements fleet.Handler.
func (g *Group) Upgraded(c *fleet.Conn, _ time.Time) {
	if c.User < len(g.users) {
		g.users[c.User].c = c
	}
}

// Turn implements fleet.Handler.
func (g *Group) Turn(*fleet.Conn, time.Time) {}

// Closed implements fleet.Handler.
func (g *Group) Closed(c *fleet.Conn, code int, err error, _ time.Time) {
	why := "closed with " + strconv.Itoa(code)
	if code == 0 {
		why = "connection lost"
		if err != nil {
			why, _, _ = strings.Cut(err.Error(), "\n") // joined errors: the first says it
			why, _, _ = strings.Cut(why, "{")          // an answer: without its body
			why = strings.TrimSpace(strings.TrimPrefix(why, "handshake: HTTP/1.1 "))
		}
	}
	if c.User >= len(g.users) {
		if c.Mark == 0 {
			g.now.NewcomersRefused[why]++
		}
		return
	}
	u := &g.users[c.User]
	u.c = nil
	if !u.lost {
		u.lost = true
		g.now.Errors[why]++
	}
	if !u.first.IsZero() {
		u.first = time.Time{}
		g.now.Errors["lost ack"]++
	}
}
