package judge

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"im-gateway/test/chaos/traffic"
)

const (
	duplicateWindow = 60 * time.Second // how long a gateway remembers an id
	duplicateIDs    = 32               // how many it remembers of a user
	clockSlack      = time.Second      // between the gateway's, Kafka's and the suite's times
)

// Evidence is what Judge looks at. Addresses are direct ones, not those of proxies.
type Evidence struct {
	Logs traffic.Logs

	UpstreamTopic, UndeliveredTopic, DeadletterTopic string
	DownstreamPrefix                                 string
	Brokers                                          []string
	Redis                                            string
	// Etcd is an endpoint; empty: registration is not judged.
	Etcd string

	// Gateways are the ids of those alive at the end.
	Gateways []string
	// Deaths are when gateways were killed or stopped, also those that came back under their id. A
	// gateway that is neither alive nor here died at an unknown time.
	Deaths []Death
	// PresenceTTL is how long Redis and etcd may take to become right, counted from Judge's call.
	PresenceTTL time.Duration
	// Deleted are ranges that the fault itself destroyed.
	Deleted []OffsetRange
}

// Death is the end of a gateway's process.
type Death struct {
	Gateway string
	At      time.Time
}

// OffsetRange is what a deleted topic held: offsets From <= o < To written until Before. A topic
// created again begins at 0, so the time tells its records from the deleted ones.
type OffsetRange struct {
	Topic     string
	Partition int32
	From, To  int64
	Before    time.Time
}

func (e *Evidence) deleted(topic string, partition int32, offset int64, at time.Time) bool {
	return slices.ContainsFunc(e.Deleted, func(r OffsetRange) bool {
		return r.Topic == topic && r.Partition == partition && at.Before(r.Before) &&
			(offset < 0 || r.From <= offset && offset < r.To)
	})
}

// Judge reads the evidence and counts. An error means that it could not be read, not a finding.
func Judge(ctx context.Context, e Evidence) (Verdict, error) {
	j := &judgement{e: &e, v: Verdict{Examples: make(map[string][]string)}}
	j.v.Counts.Refused = make(map[string]int)
	j.v.Counts.Closes = make(map[string]int)
	j.v.Counts.Reasons = make(map[string]int)
	j.users = make(map[string][]*traffic.ClientLog)
	for i := range e.Logs.Clients {
		c := &e.Logs.Clients[i]
		j.users[c.User] = append(j.users[c.User], c)
	}
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"upstream", j.upstream},
		{"downstream", j.downstream},
		{"presence", j.presence},
		{"registration", j.registration},
	} {
		if err := step.run(ctx); err != nil {
			return j.v, fmt.Errorf("judge: %s: %w", step.name, err)
		}
	}
	j.experience()
	return j.v, nil
}

// judgement is one run of Judge.
type judgement struct {
	e     *Evidence
	v     Verdict
	users map[string][]*traffic.ClientLog
}

// experience counts what users saw.
func (j *judgement) experience() {
	n := &j.v.Counts
	f := &j.v.Findings
	for i := range j.e.Logs.Clients {
		c := &j.e.Logs.Clients[i]
		n.Reconnects += max(0, len(c.Connects)-1)
		for _, a := range c.Acks {
			if !a.Success() {
				n.Refused[a.Code]++
			}
		}
		for _, d := range c.Disconnects {
			if !d.Ours {
				n.Closes[strconv.Itoa(d.Code)]++
			}
		}
		for _, x := range c.Failures {
			switch x.What {
			case "unanswered":
				j.v.found(&f.Unanswered, "unanswered", "%s at %s", x.ID, x.At.Format(time.RFC3339Nano))
			case "protocol":
				j.v.found(&f.Protocol, "protocol", "%s: %s", c.User, x.Err)
			case "frame":
				n.Refused[x.Code]++
			case "dial":
				if x.Status != 0 {
					n.Refused[strconv.Itoa(x.Status)]++
				}
			}
		}
		j.gap(c)
	}
}

// gap finds the longest time between two successes, for clients that send.
func (j *judgement) gap(c *traffic.ClientLog) {
	if c.Every <= 0 || len(c.Sent) == 0 {
		return
	}
	last := c.Sent[0].At
	for _, a := range c.Acks {
		if !a.Success() {
			continue
		}
		if g := a.At.Sub(last); g > j.v.Counts.LongestGap {
			j.v.Counts.LongestGap, j.v.Counts.GapUser = g, c.User
		}
		last = a.At
	}
}
