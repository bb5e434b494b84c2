package registry

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/rueidis"
	"github.com/rs/zerolog"
)

// The deny list in Redis: a sorted set whose members say what is denied, `jti:ID` or
// `user:ISSUED_UNTIL:ID`, and whose scores say until when, both times in Unix seconds; and a channel of
// the same name on which a new entry is told as `SCORE MEMBER`.
const (
	DenyKey     = "im-deny"
	DenyChannel = "im-deny"
)

const (
	denyReload = time.Minute // the list is read again so often, should a message have been lost
	denyRetry  = time.Second // after an outage
	denyPage   = 10_000      // entries that one command reads
	// denyMessages is how many messages may wait; when there are more the list is read again.
	denyMessages = 1024
)

// Denial is an entry of the deny list.
type Denial struct {
	TokenID string // the jti denied; else
	User    string // whose tokens are denied, those issued at IssuedUntil or before
	// IssuedUntil and Until, the end of the entry, are Unix seconds.
	IssuedUntil, Until int64
}

// errDenial is in the error of an entry that cannot be read.
var errDenial = errors.New("neither jti:ID nor user:ISSUED_UNTIL:ID, with Unix seconds until when")

// ParseDenial reads a member of the deny list with its score.
func ParseDenial(member string, until int64) (Denial, error) {
	d := Denial{Until: until}
	if id, ok := strings.CutPrefix(member, "jti:"); ok && id != "" {
		d.TokenID = id
		return d, nil
	}
	if rest, ok := strings.CutPrefix(member, "user:"); ok {
		issued, user, _ := strings.Cut(rest, ":")
		at, err := strconv.ParseInt(issued, 10, 64)
		if err == nil && at >= 0 && user != "" {
			d.User, d.IssuedUntil = user, at
			return d, nil
		}
	}
	return Denial{}, errDenial
}

// parseDenialMessage reads what is told on the channel.
func parseDenialMessage(text string) (Denial, error) {
	score, member, _ := strings.Cut(text, " ")
	until, err := strconv.ParseInt(score, 10, 64)
	if err != nil {
		return Denial{}, errDenial
	}
	return ParseDenial(member, until)
}

// DenyListOptions configure a DenyList.
type DenyListOptions struct {
	Redis rueidis.Client
	// Max is how many entries are read; 100,000.
	Max int
	// Add is called with a new entry, Replace with all of them; by one goroutine.
	Add     func(Denial)
	Replace func([]Denial)

	Logger     zerolog.Logger
	Registerer prometheus.Registerer
}

// DenyList follows the deny list in Redis.
type DenyList struct {
	o       DenyListOptions
	loads   *prometheus.CounterVec
	entries prometheus.Gauge
	dropped prometheus.Counter
	bad     prometheus.Counter
	held    int // entries that were read last
}

// NewDenyList registers the metrics; Run does the rest.
func NewDenyList(o DenyListOptions) (*DenyList, error) {
	if o.Max == 0 {
		o.Max = 100_000
	}
	d := &DenyList{
		o: o,
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "im_gateway_deny_list_loads_total", Help: "Times that the deny list was read from Redis, by result.",
		}, []string{"result"}),
		entries: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "im_gateway_deny_list_entries", Help: "Entries of the deny list in force.",
		}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "im_gateway_deny_list_dropped_total", Help: "Entries of the deny list beyond what is read, at each reading.",
		}),
		bad: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "im_gateway_deny_list_invalid_total", Help: "Entries of the deny list that could not be read.",
		}),
	}
	bound := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "im_gateway_deny_list_entries_bound", Help: "How many entries are read; of more, those that hold longest.",
	}, func() float64 { return float64(o.Max) })
	for _, result := range []string{"ok", "error"} {
		d.loads.WithLabelValues(result)
	}
	for _, c := range []prometheus.Collector{d.loads, d.entries, d.dropped, d.bad, bound} {
		if err := o.Registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the deny list's metrics: %w", err)
		}
	}
	return d, nil
}

// Load reads the list once.
func (d *DenyList) Load(ctx context.Context) error {
	list, err := d.read(ctx)
	if err != nil {
		d.loads.WithLabelValues("error").Inc()
		return fmt.Errorf("read the deny list %s: %w", DenyKey, err)
	}
	d.loads.WithLabelValues("ok").Inc()
	d.entries.Set(float64(len(list)))
	d.held = len(list)
	d.o.Replace(list)
	return nil
}

func (d *DenyList) read(ctx context.Context) ([]Denial, error) {
	c := d.o.Redis
	now := strconv.FormatInt(time.Now().Unix(), 10)
	if err := c.Do(ctx, c.B().Zremrangebyscore().Key(DenyKey).Min("-inf").Max("("+now).Build()).Error(); err != nil {
		return nil, err // every gateway clears the list: an entry that has ended is nobody's
	}
	var list []Denial
	for {
		// Those that hold longest first.
		page, err := c.Do(ctx, c.B().Zrevrangebyscore().Key(DenyKey).Max("+inf").Min(now).Withscores().
			Limit(int64(len(list)), denyPage).Build()).AsZScores()
		if err != nil {
			return nil, err
		}
		for _, z := range page {
			if len(list) == d.o.Max {
				all, err := c.Do(ctx, c.B().Zcard().Key(DenyKey).Build()).AsInt64()
				if err != nil {
					return nil, err
				}
				d.dropped.Add(float64(all - int64(len(list))))
				d.o.Logger.Warn().Int64("entries", all).Int("read", len(list)).
					Msg("the deny list is longer than what is read; the entries that end first are not in force")
				return list, nil
			}
			entry, err := ParseDenial(z.Member, int64(z.Score))
			if err != nil {
				d.bad.Inc() // it takes a place, so that the next page begins behind it
			}
			list = append(list, entry)
		}
		if len(page) < denyPage {
			return list, nil
		}
	}
}

// Run follows the list until ctx ends: entries told on the channel at once, and all of it after each
// outage and every minute. While Redis is away what was known stays in force.
func (d *DenyList) Run(ctx context.Context) error {
	for {
		err := d.follow(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was asked to end
		}
		d.o.Logger.Warn().Err(err).Msg("the deny list is not followed; what was known stays in force")
		select {
		case <-time.After(denyRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// follow subscribes, then reads the list, so that nothing is missed between, until one of them fails.
func (d *DenyList) follow(ctx context.Context) error {
	c, release := d.o.Redis.Dedicate()
	defer release()
	messages := make(chan string, denyMessages)
	var missed atomic.Bool
	ended := c.SetPubSubHooks(rueidis.PubSubHooks{OnMessage: func(m rueidis.PubSubMessage) {
		select {
		case messages <- m.Message:
		default:
			missed.Store(true)
		}
	}})
	if err := c.Do(ctx, c.B().Subscribe().Channel(DenyChannel).Build()).Error(); err != nil {
		return fmt.Errorf("subscribe to %s: %w", DenyChannel, err)
	}
	if err := d.Load(ctx); err != nil {
		return err
	}
	added := 0 // since the list was read
	reload := time.NewTicker(denyReload)
	defer reload.Stop()
	for {
		select {
		case text := <-messages:
			entry, err := parseDenialMessage(text)
			if err != nil {
				d.bad.Inc()
				break
			}
			if added++; d.held+added > d.o.Max {
				d.dropped.Inc() // room is made by the next reading, which is soon
				missed.Store(true)
				break
			}
			d.entries.Inc()
			d.o.Add(entry)
		case <-reload.C:
			missed.Store(true)
		case err := <-ended:
			return fmt.Errorf("the subscription to %s ended: %w", DenyChannel, err)
		case <-ctx.Done():
			return ctx.Err()
		}
		if missed.Load() && len(messages) == 0 {
			missed.Store(false)
			added = 0
			if err := d.Load(ctx); err != nil {
				return err
			}
		}
	}
}
