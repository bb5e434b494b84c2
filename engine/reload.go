package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A reload loads the whole configuration again, from where it came, and takes over what has changed: all of
// it or nothing. Everything that can fail is done first; then each part puts its settings into force.

// watchInterval is how often the files of the configuration are looked at. What has changed counts when it
// has not changed again by the next look.
//
// They are read, not watched by the kernel: what counts is what a reload would read, and that changes in
// ways that watches of a file, or of its directory, miss. Kubernetes swaps a link to the directory, editors
// put another file in the place, a mounted file is written to on another host. Reading a few small files
// costs some 50 us a second.
const watchInterval = time.Second

// reloads counts what became of reloads.
type reloads struct {
	applied, unchanged, refused prometheus.Counter
	good                        atomic.Bool  // the last one was no refusal
	at                          atomic.Int64 // Unix ms, of the last that was none
}

func newReloads(reg prometheus.Registerer, started time.Time) (*reloads, error) {
	r := &reloads{}
	r.good.Store(true)
	r.at.Store(started.UnixMilli())
	total := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "im_gateway_config_reloads_total",
		Help: "Times that the configuration was loaded again, by result: applied, unchanged or refused.",
	}, []string{"result"})
	r.applied, r.unchanged, r.refused = total.WithLabelValues("applied"), total.WithLabelValues("unchanged"), total.WithLabelValues("refused")
	for _, c := range []prometheus.Collector{
		total,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "im_gateway_config_last_reload_successful",
			Help: "Whether the configuration in force is what was loaded last: 1, or 0 after a refusal.",
		}, func() float64 {
			if r.good.Load() {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "im_gateway_config_last_reload_success_timestamp_seconds",
			Help: "When the configuration was last loaded and not refused, the start included.",
		}, func() float64 { return float64(r.at.Load()) / 1000 }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of reloads: %w", err)
		}
	}
	return r, nil
}

// change is one key that differs between two configurations.
type change struct {
	key    string
	reload bool
	text   string // key, old and new value, for people; secrets are not shown
}

func (c change) String() string { return c.text }

// changes lists the keys that differ, in the order of the reference.
func (l *Loaded) changes(next *Loaded) []change {
	var list []change
	for _, o := range options() {
		was, is := o.value(&l.Config).Interface(), o.value(&next.Config).Interface()
		old, now := o.text(was), o.text(is)
		if old != now {
			list = append(list, change{o.key, o.reload, o.key + ": " + o.change(old, now)})
			continue
		}
		for _, path := range o.keyFiles(&next.Config) {
			if !l.files[path].same(next.files[path]) {
				list = append(list, change{o.key, o.reload, o.key + ": the content of " + path + " changed"})
			}
		}
	}
	return list
}

// change describes a change of the option's value.
func (o *option) change(old, now string) string {
	switch {
	case !o.secret:
		return orEmpty(old) + " -> " + orEmpty(now)
	case old == "":
		return "set"
	case now == "":
		return "removed"
	}
	return "changed"
}

func orEmpty(s string) string {
	if s == "" {
		return "(empty)"
	}
	return s
}

// keyFiles lists the files with public keys that the option names; what they hold is no value.
func (o *option) keyFiles(c *Config) []string {
	switch o.key {
	case "auth.public_key_file":
		return (&Auth{PublicKeyFile: c.Auth.PublicKeyFile}).keyFiles()
	case "auth.issuers":
		return (&Auth{Issuers: c.Auth.Issuers}).keyFiles()
	}
	return nil
}

// restartError refuses a reload: keys have changed that a running gateway cannot change.
type restartError struct{ changes []change }

func (e *restartError) Error() string {
	keys := make([]string, len(e.changes))
	for i, c := range e.changes {
		keys[i] = c.key
	}
	return "a restart is needed to change " + strings.Join(keys, ", ")
}

// errStopping refuses a reload.
var errStopping = errors.New("the gateway is stopping")

// Reload asks for the configuration to be loaded again, as SIGHUP does: soon, or once the gateway has
// started. The log tells what becomes of it. Any goroutine may call it.
func (e *Engine) Reload() {
	select {
	case e.reloadAsked <- struct{}{}:
	default: // one that is to come serves this one, too
	}
}

// startReloads begins to follow the configuration; all parts are there.
func (e *Engine) startReloads(context.Context) error {
	if e.loaded.from != nil {
		e.goTask("reloads", func(ctx context.Context) error { return e.followConfig(ctx, watchInterval) })
	}
	return nil
}

// followConfig loads the configuration again when it is asked to, and when its files have changed.
func (e *Engine) followConfig(ctx context.Context, every time.Duration) error {
	look := time.NewTicker(every)
	defer look.Stop()
	seen := looks{tried: e.loaded.files}
	for {
		why := "asked for"
		select {
		case <-e.reloadAsked:
		case <-look.C:
			if why = "files changed"; !seen.settled(seen.tried.look()) {
				continue
			}
		case <-ctx.Done():
			return nil
		}
		seen = looks{tried: e.reload(ctx, why)}
	}
}

// looks are what was seen of the files.
type looks struct {
	tried files // at the last reload, whatever became of it
	last  files // at the last look, if that differed
}

// settled tells whether the files have changed, and not again since the last look: what is being written
// is left alone.
func (l *looks) settled(now files) bool {
	last := l.last
	if l.last = now; now.same(l.tried) {
		l.last = nil
	}
	return l.last != nil && last != nil && now.same(last)
}

func (f files) same(g files) bool { return maps.EqualFunc(f, g, fileRead.same) }

// look reads the files again, but for those that can be read once only.
func (f files) look() files {
	now := make(files, len(f))
	for path, r := range f {
		if !r.once {
			r = readFile(path, r.most)
		}
		now[path] = r
	}
	return now
}

// reload loads the configuration again and takes it over, or says why it does not. It returns the files
// that were read.
func (e *Engine) reload(ctx context.Context, why string) files {
	before := e.loaded.Config.Warnings()
	next, err := e.loaded.again()
	var changes []change
	if err == nil {
		changes, err = e.adopt(ctx, next)
	}
	log := e.log.With().Str("why", why).Logger()
	if err != nil {
		e.reloads.good.Store(false)
		e.reloads.refused.Inc()
		event := log.Error()
		var bad *ConfigError
		var restart *restartError
		switch {
		case errors.As(err, &bad):
			event = event.Stringers("problems", stringers(bad.Problems))
		case errors.As(err, &restart):
			event = event.Err(err).Stringers("changes", stringers(restart.changes))
		default:
			event = event.Err(err)
		}
		event.Msg("configuration not reloaded: what was in force stays, as a whole")
		return next.files
	}
	e.reloads.good.Store(true)
	e.reloads.at.Store(time.Now().UnixMilli())
	for _, w := range next.Config.Warnings() {
		if !slices.Contains(before, w) {
			log.Warn().Msg(w)
		}
	}
	if len(changes) == 0 {
		e.reloads.unchanged.Inc()
		always(log).Msg("configuration reloaded: no value has changed")
		return next.files
	}
	e.reloads.applied.Inc()
	always(log).Stringers("changes", stringers(changes)).Msg("configuration reloaded")
	return next.files
}

// stringers makes a list of what zerolog can show.
func stringers[T fmt.Stringer](list []T) []fmt.Stringer {
	out := make([]fmt.Stringer, len(list))
	for i, s := range list {
		out[i] = s
	}
	return out
}

// adopt takes another configuration over as a whole and returns what differs; or an error, and then nothing
// has changed.
func (e *Engine) adopt(ctx context.Context, next *Loaded) ([]change, error) {
	changes := e.loaded.changes(next)
	var fixed []change
	authChanges, levelChanges := false, false
	for _, c := range changes {
		if !c.reload {
			fixed = append(fixed, c)
		}
		levelChanges = levelChanges || c.key == "log.level"
		authChanges = authChanges || strings.HasPrefix(c.key, "auth.")
	}
	switch {
	case len(fixed) > 0:
		return nil, &restartError{fixed}
	case len(changes) == 0:
		e.loaded = next
		return nil, nil
	}
	cfg := next.Config // but for what the start has filled in
	cfg.GatewayID, cfg.Shard.Count, cfg.HTTP.Loops = e.cfg.GatewayID, e.cfg.Shard.Count, e.cfg.HTTP.Loops
	keys := e.keys
	var err error
	if authChanges {
		if keys, err = e.prepareKeys(ctx, cfg.Auth, next.files); err != nil {
			return nil, err
		}
	}
	useTransport, err := e.server.Prepare(transportSettings(&cfg, keys.verifier))
	if err != nil {
		return nil, err
	}
	useShards, err := e.shards.Prepare(shardSettings(&cfg))
	if err != nil {
		return nil, err
	}
	useAPI, err := e.api.Prepare(apiSettings(&cfg))
	if err != nil {
		return nil, err
	}

	// Nothing below can fail.
	e.mu.Lock()
	stopping := e.stopping
	if !stopping {
		e.inForce.Store(&cfg)
		if authChanges {
			e.useKeys(keys)
		}
		useTransport()
		useShards()
		useAPI()
		e.acting.sum.use(cfg.Admin.Token)
		e.grpc.useToken(cfg.GRPC.Token)
		e.peers.useToken(cfg.GRPC.Token)
		e.memory.use(cfg.Limits.MemoryHighWaterPercent)
		if levelChanges { // else an operator may have chosen another for the time being
			_ = LogLevel{}.Set(cfg.Log.Level) // one of those that validate lets pass
		}
	}
	e.mu.Unlock()
	if stopping {
		return nil, errStopping
	}
	e.loaded = next
	e.noteKeys() // a set that has not come may be gone
	return changes, nil
}
