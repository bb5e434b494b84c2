package main

import (
	"fmt"
	"io"
	"slices"
	"time"
)

// measure is one scenario and who takes part.
type measure struct {
	id, args string
	kafka    bool
	subjects []subject
	strace   time.Duration // count system calls from then on
	rate     float64       // messages a second, for the calls per message
	halfOf   string        // the rate is half of what the seed stack did in this measure
}

var both = []subject{gateways(1), seed}

var measures = []measure{
	{id: "idle", args: "idle -users 18000 -steps 5 -warmup 8s -duration 3s", subjects: both},
	{id: "idle-echo", args: "idle -plain -users 18000 -steps 3 -warmup 2s -duration 2s", subjects: []subject{
		echoer("transport", "im-bench", "echo"), echoer("gnet", "peers/gnetecho"), echoer("gws", "peers/gws"),
		echoer("nbio", "peers/nbio"), echoer("gorilla", "peers/gorilla")}},
	{id: "idle-centrifuge", args: `idle -plain -hello {"id":1,"connect":{}} -users 10000 -steps 3 -warmup 2s -duration 2s`, subjects: []subject{
		echoer("centrifuge", "peers/centrifuge", "-ping", "0")}},
	{id: "connect", args: "connect -users 10000", subjects: both},
	{id: "ack", args: "upstream -users 10000 -rate 10000 -warmup 3s -duration 6s", kafka: true, subjects: both},
	{id: "ack-500", args: "upstream -users 10000 -rate 500 -warmup 3s -duration 6s", kafka: true, subjects: both},
	{id: "ack-5000", args: "upstream -users 10000 -rate 5000 -warmup 3s -duration 6s", kafka: true, subjects: both},
	{id: "ack-full", args: "upstream -users 1000 -window 32 -warmup 2s -duration 5s", kafka: true, subjects: both},
	{id: "ack-half", args: "upstream -users 1000 -warmup 2s -duration 5s", kafka: true, halfOf: "ack-full", subjects: both},
	{id: "ack-w1-1k", args: "upstream -users 1000 -window 1 -warmup 2s -duration 5s", kafka: true, subjects: both},
	{id: "ack-w1-10k", args: "upstream -users 10000 -window 1 -warmup 2s -duration 5s", kafka: true, subjects: both},
	{id: "push", args: "downstream -users 10000 -rate 8000 -warmup 3s -duration 6s", kafka: true, subjects: both},
	{id: "push-full", args: "downstream -users 10000 -window 2 -warmup 2s -duration 5s", kafka: true, subjects: both},
	{id: "push-500", args: "downstream -users 1000 -rate 500 -warmup 3s -duration 6s", kafka: true, subjects: []subject{
		gateways(1), seed, {name: "bare sarama", alone: bareSarama}}},
	{id: "fanout", args: "fanout -users 10000 -rate 20 -warmup 3s -duration 6s", kafka: true, subjects: []subject{
		gateways(1), seed, {name: "plain write", alone: rawWrite}}},
	{id: "echo", args: "echo-load -users 1000 -window 1 -warmup 2s -duration 5s", subjects: []subject{
		echoer("transport", "im-bench", "echo"), echoer("gnet", "peers/gnetecho"), echoer("gws", "peers/gws"),
		echoer("nbio", "peers/nbio"), echoer("gorilla", "peers/gorilla")}},
	{id: "few", args: "upstream -users 1000 -rate 5000 -warmup 3s -duration 6s", kafka: true, subjects: both[:1]},
	{id: "many", args: "upstream -users 18000 -rate 5000 -warmup 3s -duration 6s", kafka: true, subjects: both[:1]},
	{id: "nodes", args: "upstream -users 9000 -rate 6000 -warmup 3s -duration 6s", kafka: true, subjects: []subject{
		gateways(1), gateways(2), gateways(3)}},
	{id: "calls", args: "upstream -users 10000 -rate 5000 -warmup 3s -duration 6s", kafka: true, strace: 6 * time.Second, rate: 5000,
		subjects: both},
	{id: "shards", subjects: []subject{{name: "shards", alone: shardsAlone}}},
}

func ids() []string {
	var out []string
	for _, m := range measures {
		out = append(out, m.id)
	}
	return out
}

// row is a line of the table: a figure of a subject, against that of another.
type row struct {
	what, measure, value, unit string
	of, against                string // against "": no ratio
	goal                       float64
	atLeast                    bool // the goal is the least, not the most
	absolute                   bool // the goal is for the figure itself
	less                       bool // the goal is for the difference
}

var rows = []row{
	{what: "memory per idle user, 2,000 to 18,000", measure: "idle", value: "server memory per user", unit: "B", of: "gateway", against: "seed stack", goal: 1000, absolute: true},
	{what: "peak memory, 10,000 users, 10,000 acks/s", measure: "ack", value: "server memory, peak", unit: "MiB", of: "gateway", against: "seed stack", goal: 1. / 12},
	{what: "CPU per connect, token and presence", measure: "connect", value: "server CPU per connect", unit: "us", of: "gateway", against: "seed stack", goal: 0.45},
	{what: "CPU per ack at 10,000/s, 10,000 users", measure: "ack", value: "server CPU per ack", unit: "us", of: "gateway", against: "seed stack", goal: 0.42},
	{what: "CPU per ack, saturated, 1,000 users", measure: "ack-full", value: "server CPU per ack", unit: "us", of: "gateway", against: "seed stack", goal: 0.38},
	{what: "acks per second, saturated, 1,000 users", measure: "ack-full", value: "acked", of: "gateway", against: "seed stack", goal: 2.6, atLeast: true},
	{what: "acks per second, one outstanding, 1,000 users", measure: "ack-w1-1k", value: "acked", of: "gateway", against: "seed stack", goal: 1.25, atLeast: true},
	{what: "acks per second, one outstanding, 10,000 users", measure: "ack-w1-10k", value: "acked", of: "gateway", against: "seed stack", goal: 1.7, atLeast: true},
	{what: "CPU per ack at 500/s, 10,000 users", measure: "ack-500", value: "server CPU per ack", unit: "us", of: "gateway", against: "seed stack", goal: 0.6},
	{what: "CPU per ack at 5,000/s, 10,000 users", measure: "ack-5000", value: "server CPU per ack", unit: "us", of: "gateway", against: "seed stack", goal: 0.6},
	{what: "ack p99 at half of the seed stack's maximum", measure: "ack-half", value: "acked p99", unit: "ms", of: "gateway", against: "seed stack", goal: 0.5},
	{what: "ack p99 at 10,000/s, 10,000 users", measure: "ack", value: "acked p99", unit: "ms", of: "gateway", against: "seed stack"},
	{what: "CPU per push at 8,000/s, 10,000 users", measure: "push", value: "server CPU per push", unit: "us", of: "gateway", against: "seed stack", goal: 0.55},
	{what: "CPU per push, saturated", measure: "push-full", value: "server CPU per push", unit: "us", of: "gateway", against: "seed stack", goal: 0.45},
	{what: "pushes per second, saturated", measure: "push-full", value: "pushed", of: "gateway", against: "seed stack", goal: 1.8, atLeast: true},
	{what: "fan-out to 500, CPU per target", measure: "fanout", value: "server CPU per push", unit: "us", of: "gateway", against: "seed stack", goal: 0.65},
	{what: "the same, against plain write(2)", measure: "fanout", value: "server CPU per push", unit: "us", of: "gateway", against: "plain write", goal: 1.35},
	{what: "echo, 128 B, 1,000 connections", measure: "echo", value: "server CPU per echo", unit: "us", of: "transport", against: "gnet", goal: 1.1},
	{what: "the same, against gws", measure: "echo", value: "server CPU per echo", unit: "us", of: "transport", against: "gws"},
	{what: "the same, against nbio", measure: "echo", value: "server CPU per echo", unit: "us", of: "transport", against: "nbio"},
	{what: "the same, against gorilla", measure: "echo", value: "server CPU per echo", unit: "us", of: "transport", against: "gorilla"},
	{what: "memory per idle connection, no user behind it", measure: "idle-echo", value: "server memory per user", unit: "B", of: "transport", against: "gnet"},
	{what: "the same, against gws", measure: "idle-echo", value: "server memory per user", unit: "B", of: "transport", against: "gws"},
	{what: "the same, against nbio", measure: "idle-echo", value: "server memory per user", unit: "B", of: "transport", against: "nbio"},
	{what: "the same, against gorilla", measure: "idle-echo", value: "server memory per user", unit: "B", of: "transport", against: "gorilla"},
	{what: "memory per idle user of centrifuge", measure: "idle-centrifuge", value: "server memory per user", unit: "B", of: "centrifuge"},
	{what: "CPU per ack at 5,000/s, 1,000 users", measure: "few", value: "server CPU per ack", unit: "us", of: "gateway"},
	{what: "the same with 18,000 users, over that", measure: "many", value: "server CPU per ack", unit: "us", of: "gateway", against: "few/gateway", goal: 1.2},
	{what: "push p50 at 500/s, above a bare consumer", measure: "push-500", value: "pushed p50", unit: "ms", of: "gateway", against: "bare sarama", goal: 1, less: true},
	{what: "CPU per ack of two gateways, over one", measure: "nodes", value: "server CPU per ack", unit: "us", of: "2 gateways", against: "gateway", goal: 1.1},
	{what: "CPU per ack of three gateways, over one", measure: "nodes", value: "server CPU per ack", unit: "us", of: "3 gateways", against: "gateway", goal: 1.1},
	{what: "write(2) calls per ack at 5,000/s", measure: "calls", value: "calls of write", of: "gateway", against: "seed stack"},
	{what: "read(2) calls per ack", measure: "calls", value: "calls of read", of: "gateway", against: "seed stack"},
	{what: "epoll calls per ack", measure: "calls", value: "calls of epoll_pwait", of: "gateway", against: "seed stack"},
	{what: "futex calls per ack", measure: "calls", value: "calls of futex", of: "gateway", against: "seed stack"},
	{what: "shards alone, 1,000,000 sessions: heap", measure: "shards", value: "heap bytes per session", unit: "B", of: "shards", goal: 300, absolute: true},
	{what: "shards alone: per routed message", measure: "shards", value: "ns per message", unit: "ns", of: "shards", goal: 250, absolute: true},
	{what: "shards alone: p99 of a tick", measure: "shards", value: "tick p99, ms", unit: "ms", of: "shards", goal: 2, absolute: true},
}

// results are figures by measure, subject and name.
type results map[string]map[string]map[string][]float64

func (r results) add(measure, subject string, values map[string]float64) {
	if r[measure] == nil {
		r[measure] = map[string]map[string][]float64{}
	}
	if r[measure][subject] == nil {
		r[measure][subject] = map[string][]float64{}
	}
	for n, v := range values {
		r[measure][subject][n] = append(r[measure][subject][n], v)
	}
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

func (r results) print(w io.Writer) {
	fmt.Fprintln(w, "| what | measured | against | ratio | goal | |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|")
	for _, x := range rows {
		mine := r[x.measure][x.of][x.value]
		if len(mine) == 0 {
			continue
		}
		m, who := x.measure, x.against
		if who == "few/gateway" {
			m, who = "few", "gateway"
		}
		other := r[m][who][x.value]
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s |\n", x.what, spread(mine, x.unit), x.peer(other, who), x.ratio(mine, other), x.want(), x.verdict(mine, other))
	}
}

func spread(v []float64, unit string) string {
	s := fmt.Sprintf("%.4g (%.4g - %.4g)", median(v), slices.Min(v), slices.Max(v))
	if unit != "" {
		s += " " + unit
	}
	return s
}

func (x *row) peer(other []float64, who string) string {
	if len(other) == 0 {
		return ""
	}
	return who + ": " + spread(other, x.unit)
}

func (x *row) ratio(mine, other []float64) string {
	switch {
	case len(other) == 0:
		return ""
	case x.less:
		return fmt.Sprintf("%+.2f %s", median(mine)-median(other), x.unit)
	}
	return fmt.Sprintf("%.3f", median(mine)/median(other))
}

func (x *row) want() string {
	switch {
	case x.goal == 0:
		return ""
	case x.absolute, x.less:
		return fmt.Sprintf("<= %.4g %s", x.goal, x.unit)
	case x.atLeast:
		return fmt.Sprintf(">= %.3g", x.goal)
	}
	return fmt.Sprintf("<= %.3g", x.goal)
}

func (x *row) verdict(mine, other []float64) string {
	if x.goal == 0 || (len(other) == 0 && !x.absolute) {
		return ""
	}
	v := median(mine)
	switch {
	case x.absolute:
	case x.less:
		v -= median(other)
	default:
		v /= median(other)
	}
	if (x.atLeast && v >= x.goal) || (!x.atLeast && v <= x.goal) {
		return "met"
	}
	return "missed"
}
