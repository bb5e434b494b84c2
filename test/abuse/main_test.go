package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"im-gateway/test/abuse/attack"
	"im-gateway/test/abuse/users"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, // gnet's pool, which lives as long as the process
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).purgeStaleWorkers"),
		goleak.IgnoreAnyFunction("github.com/panjf2000/ants/v2.(*poolCommon).ticktock"))
}

// held is a row in which everything held, and what was counted before and after.
func held() (r *running, out *outcome, before, after map[string]float64) {
	o := &row{expect: []string{"close 1008"}, allow: []string{open, "HTTP 4*"}, moved: []string{"c"}, most: 2}
	w := users.Window{Acks: 10, Pushes: 10, P99: 10 * time.Millisecond, Newcomers: 1}
	worse, last := w, w
	worse.P99, last.Open = 25*time.Millisecond, 5
	out = &outcome{
		Attack: attack.Result{Outcomes: map[string]int{"close 1008": 3, open: 2, "HTTP 431": 1}},
		Before: w, With: worse, After: last,
	}
	return &running{row: o, users: 5}, out, map[string]float64{"c": 1}, map[string]float64{"c": 2}
}

func TestJudge(t *testing.T) {
	r, out, before, after := held()
	r.judge(out, before, after)
	if len(r.failed) > 0 || out.Ratio != 2.5 || out.Errors != 0 {
		t.Fatalf("a row that held: failed %q, ratio %v, %d errors", r.failed, out.Ratio, out.Errors)
	}
	for name, c := range map[string]struct {
		spoil func(o *outcome, after map[string]float64)
		want  string
	}{
		"a panic":             {func(_ *outcome, after map[string]float64) { after["im_gateway_transport_panics_total"] = 1 }, "panic"},
		"a still counter":     {func(_ *outcome, after map[string]float64) { after["c"] = 1 }, "c has not risen"},
		"no code":             {func(o *outcome, _ map[string]float64) { delete(o.Attack.Outcomes, "close 1008") }, "no attacker saw"},
		"another code":        {func(o *outcome, _ map[string]float64) { o.Attack.Outcomes["close 1011"] = 1 }, "1 attempts came to"},
		"too many in":         {func(o *outcome, _ map[string]float64) { o.Attack.Outcomes[open] = 3 }, "3 attackers are in"},
		"a lost ack":          {func(o *outcome, _ map[string]float64) { o.With.Errors = map[string]int{"lost ack": 2} }, "2 times: lost ack"},
		"an error afterwards": {func(o *outcome, _ map[string]float64) { o.After.Errors = map[string]int{"x": 1} }, "1 times: x"},
		"a refusal":           {func(o *outcome, _ map[string]float64) { o.With.SentAgain = map[string]int{"OVERLOADED": 1} }, "send again"},
		"silence":             {func(o *outcome, _ map[string]float64) { o.With.Acks = 0 }, "acks before"},
		"no pushes":           {func(o *outcome, _ map[string]float64) { o.After.Pushes = 0 }, "pushes before"},
		"a user gone":         {func(o *outcome, _ map[string]float64) { o.After.Open = 4 }, "4 of 5 users"},
		"something left":      {func(o *outcome, _ map[string]float64) { o.After.Outstanding = 1 }, "1 things outstanding"},
		"a closed door": {func(o *outcome, _ map[string]float64) {
			o.After.NewcomersRefused = map[string]int{"503 Service Unavailable": 1}
		}, "newcomers afterwards"},
	} {
		t.Run(name, func(t *testing.T) {
			r, out, before, after := held()
			c.spoil(out, after)
			r.judge(out, before, after)
			if len(r.failed) != 1 || !strings.Contains(r.failed[0], c.want) {
				t.Errorf("failed %q, want %q alone", r.failed, c.want)
			}
		})
	}
}

// TestRows holds that each row can fail: it expects an outcome, names its limit, and its abuse exists.
func TestRows(t *testing.T) {
	var names []string
	for i := range rows {
		o := &rows[i]
		if o.name == "" || o.what == "" || o.limit == "" || len(o.expect) == 0 || o.spec.N == 0 || o.hold == 0 {
			t.Errorf("row %q is incomplete", o.name)
		}
		if slices.Contains(names, o.name) {
			t.Errorf("two rows are called %q", o.name)
		}
		names = append(names, o.name)
		if !attack.Known(o.spec.Kind) {
			t.Errorf("row %q: no abuse is called %q", o.name, o.spec.Kind)
		}
	}
}
