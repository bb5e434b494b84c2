package bench

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Options describe a run of a scenario. Zero values take the defaults named.
type Options struct {
	Scenario string   `json:"scenario"`
	Label    string   `json:"label,omitempty"` // who is measured, for the report
	URLs     []string `json:"urls"`            // ws://127.0.0.1:8080/ws; user n goes to URLs[n % len]

	Users     int    `json:"users"` // 1 to 18,000 in one process; 100
	FirstUser int    `json:"first_user,omitempty"`
	Prefix    string `json:"prefix,omitempty"` // of user names; "bench-"
	// Tokens signs or holds the users' tokens. Never part of a report.
	Tokens  Tokens       `json:"-"`
	Sources []netip.Addr `json:"sources,omitempty"` // local addresses, taken in turn

	ConnectRate float64 `json:"connect_rate,omitempty"` // connects per second; 0: as fast as possible
	Dialers     int     `json:"dialers,omitempty"`      // connects in flight; 64

	Rates    []Rate        `json:"rates,omitempty"`  // one stage each; 1,000 per second
	Window   int           `json:"window,omitempty"` // closed loop: messages outstanding per user, instead of a rate
	Warmup   time.Duration `json:"warmup"`           // of each stage; 2 s
	Duration time.Duration `json:"duration"`         // measured, of each stage; 10 s
	Settle   time.Duration `json:"settle"`           // longest wait for what is outstanding; 15 s
	Size     Dist          `json:"size"`             // bytes of content of a message; 128
	Group    Dist          `json:"group"`            // users of a group, in fanout and chat; 500

	DrainPID int `json:"drain_pid,omitempty"` // of drain: the gateway process to end; 0: somebody else ends it

	Plain bool `json:"plain,omitempty"` // the servers are no gateways and say no `connected`: for connect and idle

	Hello string `json:"hello,omitempty"` // with Plain: a text message that each user sends when it is connected

	Steps int `json:"steps,omitempty"` // of idle: numbers of users at which memory is read; 5

	Kafka            []string `json:"kafka,omitempty"`   // brokers; none: acks are not checked against Kafka
	UpstreamTopic    string   `json:"upstream_topic"`    // im-upstream-topic
	DownstreamPrefix string   `json:"downstream_prefix"` // im-downstream-topic-

	Run string `json:"run"` // names the messages of this run; random
}

// DefaultOptions are the values of Options that are not zero.
func DefaultOptions() Options {
	return Options{
		URLs: []string{"ws://127.0.0.1:8080/ws"}, Users: 100, Prefix: "bench-",
		Rates: []Rate{{1000, 1000}}, Warmup: 2 * time.Second, Duration: 10 * time.Second, Settle: 15 * time.Second,
		Size: Fixed(128), Group: Fixed(500), Steps: 5,
		UpstreamTopic: "im-upstream-topic", DownstreamPrefix: "im-downstream-topic-",
	}
}

// maxUsers leaves room for other files under a limit of 20,000.
const maxUsers = 18_000

// Check tells, for a person, what is wrong with the options of a run by n processes.
func (o Options) Check(n int) error {
	o.Users = (o.Users + n - 1) / n
	return o.validate()
}

func (o *Options) validate() error {
	if o.Run == "" {
		var b [4]byte
		_, _ = rand.Read(b[:]) // never fails
		o.Run = hex.EncodeToString(b[:])
	}
	if o.Dialers == 0 {
		o.Dialers = 64
	}
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	check(len(o.URLs) > 0, "url: give at least one")
	check(o.Users >= 1 && o.Users <= maxUsers, fmt.Sprintf("users: 1 to %d in one process; -processes makes room for more", maxUsers))
	check(o.FirstUser >= 0, "first-user: not below 0")
	check(o.Dialers >= 1 && o.Dialers <= 4096, "dialers: 1 to 4096")
	check(o.ConnectRate >= 0, "connect-rate: not below 0")
	check(len(o.Rates) > 0, "rate: give at least one")
	check(o.Window >= 0 && o.Window <= 1024, "window: 0 to 1024 messages per user")
	check(o.Warmup >= 0, "warmup: not below 0")
	check(o.Duration > 0, "duration: above 0")
	check(o.Size.Min >= 1 && o.Size.Max <= 60_000, "size: 1 to 60000 bytes")
	check(o.Group.Min >= 1 && o.Group.Max <= maxUsers, fmt.Sprintf("group: 1 to %d users", maxUsers))
	check(o.Steps >= 2 && o.Steps <= 100, "steps: 2 to 100")
	check(!strings.ContainsAny(o.Prefix, "\"\\ \n"), "prefix: no quotes, backslashes or spaces")
	check(slices.Contains(Scenarios(), o.Scenario), fmt.Sprintf("scenario %q: one of %s", o.Scenario, strings.Join(Scenarios(), ", ")))
	if needs := scenarios[o.Scenario].needsKafka; needs {
		check(len(o.Kafka) > 0, "kafka: this scenario writes records: give the brokers")
	}
	return errors.Join(errs...)
}

// user is the name of the n-th user of this process.
func (o *Options) user(n int) string { return fmt.Sprintf("%s%d", o.Prefix, o.FirstUser+n) }
