package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"im-gateway/test/chaos/judge"
	"im-gateway/test/chaos/world"
)

// defect is a mistake that the gateway is built with on purpose: a suite that does not find it is worth
// nothing.
type defect struct {
	name  string // CHAOS_DEFECT
	fault fault
	found func(judge.Row) bool
}

var defects = []defect{
	{
		name:  "ack-before-store",
		fault: fault{name: "defect ack before store", what: "acks go out before Kafka has the messages; Kafka frozen, a gateway SIGKILLed", do: killWhileKafkaIsFrozen},
		found: func(r judge.Row) bool { return r.Verdict.Findings.FalseAcks > 0 && r.Verdict.Findings.AckedLost > 0 },
	},
	{
		name:  "commit-before-delivery",
		fault: fault{name: "defect commit before delivery", what: "offsets are committed as records are read; clients cut off, their gateway SIGKILLed", front: true, do: killWhileClientsAreCut},
		found: func(r judge.Row) bool { return r.Verdict.Findings.Lost > 0 },
	},
	{
		name:  "unfenced-delete",
		fault: fault{name: "defect unfenced delete", what: "a session's end deletes the presence entry whosoever it is", do: hops},
		found: func(r judge.Row) bool { return strings.Contains(strings.Join(r.Failed, " "), "Redis did not name") },
	},
}

// healthy are the same faults without the defects, which must pass.
var healthy = []fault{
	{name: "gateway killed kafka frozen", what: "Kafka frozen for 4 s and a gateway SIGKILLed meanwhile", do: killWhileKafkaIsFrozen},
	{name: "gateway killed clients cut", what: "clients of a gateway cut off for 3 s, then the gateway SIGKILLed", front: true, do: killWhileClientsAreCut},
}

func killWhileKafkaIsFrozen(ctx context.Context, r *row) error {
	var errs []error
	for i := range r.w.Kafka.N() {
		errs = append(errs, r.w.Kafka.Broker(i).Stop())
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := roundTrip(ctx, r.w.Kafka.Brokers()[0], kafkaVersions, time.Second)
	sleep(ctx, 3*time.Second)
	r.g(2).Kill()
	r.died(r.g(2))
	for i := range r.w.Kafka.N() {
		errs = append(errs, r.w.Kafka.Broker(i).Cont())
	}
	if err != nil {
		r.bite("no broker answered for 4 s, and g2 was killed in that time")
	}
	return errors.Join(errs...)
}

func killWhileClientsAreCut(ctx context.Context, r *row) error {
	g := r.g(2)
	if err := g.Front.Cut(); err != nil {
		return err
	}
	_, err := roundTrip(ctx, g.Front.Addr(), "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", time.Second)
	sleep(ctx, 3*time.Second)
	g.Kill()
	r.died(g)
	if err != nil {
		r.bite("nothing came through to the clients of g2 for 3 s, then it was killed")
	}
	return nil
}

// selfTest runs each defect and returns what was caught, or an error that names what was not.
func selfTest(ctx context.Context, w *world.World, short bool) (caught []string, err error) {
	defer func() { err = errors.Join(err, restartAll(ctx, w, nil)) }()
	for _, d := range defects {
		if err := restartAll(ctx, w, map[string]string{"CHAOS_DEFECT": d.name}); err != nil {
			return caught, err
		}
		d.fault.patience = 15 * time.Second // what a defect has lost never comes
		row, err := runFault(ctx, w, d.fault, short)
		if err != nil {
			return caught, fmt.Errorf("%s: %w", d.fault.name, err)
		}
		if !d.found(row) {
			return caught, fmt.Errorf("the defect %s was not caught: %q", d.name, row.Failures())
		}
		seen := row.Verdict.Violations()
		if len(seen) == 0 {
			seen = row.Failed
		}
		first, _, _ := strings.Cut(seen[0], ", e.g.")
		line := d.name + ": " + first
		caught = append(caught, line)
		fmt.Println("caught", line)
	}
	return caught, nil
}

// restartAll kills every gateway and starts it with other settings.
func restartAll(ctx context.Context, w *world.World, settings map[string]string) error {
	var all sync.WaitGroup
	errs := make([]error, len(w.Gateways))
	for i, g := range w.Gateways {
		all.Go(func() {
			g.Kill()
			errs[i] = g.With(settings).Start(ctx)
		})
	}
	all.Wait()
	return errors.Join(errs...)
}
