package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// line is a row on the terminal.
func (o *outcome) line() string {
	state := "ok  "
	if len(o.Failed) > 0 {
		state = "FAIL"
	}
	return fmt.Sprintf("%s %s: %d attempts in %.0f s (%s); users' p99 %s, before %s, ratio %.2f, %d errors, %s sent again; newcomers %d in, %s turned away; MiB %s; %.0f s",
		state, o.Name, o.Attack.Attempts, o.Attack.Seconds, list(o.Attack.Outcomes), round(o.With.P99), round(o.Before.P99), o.Ratio,
		o.Errors, list(o.With.SentAgain), o.With.Newcomers, list(o.With.NewcomersRefused), mib(o.RSS), o.Seconds)
}

func mib(rss [3]int64) string { return fmt.Sprintf("%d, %d, %d", rss[0]>>20, rss[1]>>20, rss[2]>>20) }

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

// list is counts in words, largest first.
func list(counts map[string]int) string {
	if len(counts) == 0 {
		return "none"
	}
	names := slices.Collect(maps.Keys(counts))
	slices.SortFunc(names, func(a, b string) int {
		if d := counts[b] - counts[a]; d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	parts := make([]string, len(names))
	for i, n := range names {
		parts[i] = fmt.Sprintf("%s: %d", n, counts[n])
	}
	return strings.Join(parts, ", ")
}

// settings are a row's, in words.
func (o *outcome) settings() string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(o.Set)) {
		parts = append(parts, fmt.Sprintf("`%s=%s`", k, o.Set[k]))
	}
	if len(parts) == 0 {
		return "the defaults"
	}
	return strings.Join(parts, " ")
}

func report(o options, done []outcome) error {
	if o.out == "" {
		return nil
	}
	form := "full"
	if o.short {
		form = "short"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `# What abuse meets

Written by `+"`make abuse`"+` (%s form, %s): one gateway with its default configuration but for what a row
names, on a real Kafka, etcd and Redis; attackers in one process, %d well-behaved users in another, who each
send a message every few seconds, wait for its ack, and are pushed records; all on one machine of two cores,
so that the attackers' own work counts in the users' latency. A row fails when a user loses an ack, a push or
the connection, when attackers see another outcome than those named, when the limit's counter stands still,
when memory does not come back, or when the gateway is not the same process afterwards. The ratio is that of
the p99 of the users' ack latency with the abuse and just before it; it is reported, not judged.

| abuse | limit that stopped it | code given | users' p99 | ratio | users' errors | RSS MiB before, peak, after |
|---|---|---|--:|--:|--:|--:|
`, form, time.Now().Format("2006-01-02"), done[0].Users)
	for i := range done {
		d := &done[i]
		name := d.Name
		if len(d.Failed) > 0 {
			name = "**failed**: " + name
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %.2f | %d | %s |\n", name, d.Limit, list(d.Attack.Outcomes),
			round(d.With.P99), d.Ratio, d.Errors, mib(d.RSS))
	}
	b.WriteString("\n## Details\n")
	for i := range done {
		d := &done[i]
		fmt.Fprintf(&b, "\n**%s**: %s. %d attackers, %d attempts in %.0f s; settings: %s.\n\n", d.Name, d.What, d.Attackers,
			d.Attack.Attempts, d.Attack.Seconds, d.settings())
		fmt.Fprintf(&b, "- users: p50, p99, most %s, %s, %s before; %s, %s, %s with it. %d acks, %d pushes (p99 %s); sent again: %s\n",
			round(d.Before.P50), round(d.Before.P99), round(d.Before.Max), round(d.With.P50), round(d.With.P99), round(d.With.Max),
			d.With.Acks, d.With.Pushes, round(d.With.PushP99), list(d.With.SentAgain))
		fmt.Fprintf(&b, "- newcomers in it: %d came in; turned away: %s\n", d.With.Newcomers, list(d.With.NewcomersRefused))
		var counted []string
		for _, name := range slices.Sorted(maps.Keys(d.Counted)) {
			counted = append(counted, fmt.Sprintf("`%s` %.0f", strings.TrimPrefix(name, "im_gateway_"), d.Counted[name]))
		}
		fmt.Fprintf(&b, "- counted: %s\n", strings.Join(counted, ", "))
		for _, f := range d.Failed {
			fmt.Fprintf(&b, "- **failed**: %s\n", f)
		}
	}
	js, err := json.MarshalIndent(done, "", " ")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := errors.Join(os.WriteFile(o.out+".md", []byte(b.String()), 0o644), os.WriteFile(o.out+".json", append(js, '\n'), 0o644)); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}
