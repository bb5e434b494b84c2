package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"im-gateway/bench"
	"im-gateway/bench/report"
	"im-gateway/bench/shards"
)

// merge makes one report of those that several hosts wrote.
func merge(args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench merge A.json B.json ...", pflag.ContinueOnError)
	var f flags
	fs.StringVar(&f.json, "json", "", "write the merged report to this file as JSON; -: to stdout instead of text")
	fs.StringVar(&f.csv, "csv", "", "write a row a second to this file")
	fs.StringVar(&f.html, "html", "", "write a page with charts to this file")
	files, err := parseFiles(fs, args, stderr)
	if err != nil {
		return err
	}
	if len(files) < 2 {
		return usageError{errors.New("give the report files of at least two hosts")}
	}
	var sets []*report.Set
	for _, name := range files {
		s, err := report.ReadFile(name)
		if err != nil {
			return usageError{err}
		}
		if len(sets) > 0 && len(s.Runs) != len(sets[0].Runs) {
			return usageError{fmt.Errorf("%s has %d runs, %s has %d", files[0], len(sets[0].Runs), name, len(s.Runs))}
		}
		sets = append(sets, s)
	}
	merged := report.Set{Schema: 1}
	for i := range sets[0].Runs {
		var parts []*report.Report
		for _, s := range sets {
			parts = append(parts, s.Runs[i])
		}
		r, err := report.Merge(parts)
		if err != nil {
			return usageError{err}
		}
		bench.Values(r)
		merged.Runs = append(merged.Runs, r)
	}
	return f.write(&merged, stdout)
}

// compare says how the second side differs from the first.
func compare(args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench compare A.json[,A2.json...] B.json[,B2.json...]", pflag.ContinueOnError)
	files, err := parseFiles(fs, args, stderr)
	if err != nil {
		return err
	}
	if len(files) != 2 {
		return usageError{errors.New("give two sides, each one or more report files with commas between them")}
	}
	var sides [2]report.Set
	for i, list := range files {
		for _, name := range strings.Split(list, ",") {
			s, err := report.ReadFile(name)
			if err != nil {
				return usageError{err}
			}
			sides[i].Runs = append(sides[i].Runs, s.Runs...)
		}
	}
	c, err := report.Compare(&sides[0], &sides[1])
	if err != nil {
		return usageError{err}
	}
	_, err = io.WriteString(stdout, c.Text())
	return err
}

// runShards measures the actors alone.
func runShards(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := pflag.NewFlagSet("im-bench shards", pflag.ContinueOnError)
	var o shards.Options
	fs.IntVar(&o.Sessions, "sessions", 1_000_000, "simulated sessions, without sockets")
	fs.IntVar(&o.Shards, "shards", 1, "shard actors")
	fs.IntVar(&o.Fanout, "fanout", 500, "users of a group")
	fs.DurationVar(&o.Heartbeat, "heartbeat", 30*time.Second, "between pings, and between refreshes of presence")
	fs.DurationVar(&o.IdleTime, "idle", 10*time.Second, "time with heartbeats only")
	asJSON := fs.Bool("json", false, "print the result as JSON")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	r, err := shards.Run(ctx, o)
	if err != nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", " ")
		return enc.Encode(r)
	}
	fmt.Fprintf(stdout, "%d sessions on %d shards: %.0f bytes of heap each\n", r.Sessions, o.Shards, r.BytesPerSession)
	fmt.Fprintf(stdout, "  %.0f ns of a shard per routed message, %.0f per push, %.0f per target of a fan-out to %d\n", r.NsPerMessage, r.NsPerPush, r.NsPerTarget, o.Fanout)
	fmt.Fprintf(stdout, "  %d heartbeat ticks: p99 %s, longest %s, %d over 2 ms\n", r.Ticks, r.TickP99, r.TickMax, r.Over2ms)
	return nil
}
