package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"time"

	"im-gateway/bench/report"
)

// Job is what a worker process is told on its standard input, as one line of JSON. Secrets go this
// way and no other.
type Job struct {
	Options Options     `json:"options"`
	Tokens  TokenSource `json:"tokens"`
}

// event is what a worker says on its standard output, a line each. A worker that says that it is
// ready, at rest, or has reported, goes on when it is told to, by an empty line.
type event struct {
	Phase   string           `json:"phase,omitempty"`
	Ready   bool             `json:"ready,omitempty"`
	Measure bool             `json:"measure,omitempty"`
	Ended   bool             `json:"measured,omitempty"`
	Rested  int              `json:"rested,omitempty"`
	Up      int              `json:"up,omitempty"`
	Point   *report.Point    `json:"point,omitempty"`
	Reports []*report.Report `json:"reports,omitempty"`
}

const (
	phaseConnect = "connect"
	phaseLoad    = "load"
	phaseSettle  = "settle"
	phaseVerify  = "verify"
)

// Work is a worker's life: a job from in, events to out. Its error goes to the parent by the exit
// code and standard error.
func Work(ctx context.Context, in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read the job: %w", err)
	}
	var job Job
	if err := json.Unmarshal(line, &job); err != nil {
		return fmt.Errorf("read the job: %w", err)
	}
	if job.Options.Tokens, err = job.Tokens.Open(); err != nil {
		return err
	}
	enc := json.NewEncoder(out)
	var failed error
	say := func(e event) {
		if err := enc.Encode(e); err != nil && failed == nil {
			failed = fmt.Errorf("tell the parent: %w", err)
		}
	}
	released := func() error {
		if _, err := lines.ReadBytes('\n'); err != nil {
			return fmt.Errorf("wait for the parent: %w", err)
		}
		return nil
	}
	reports, err := Run(ctx, job.Options, Hooks{
		Phase:    func(what string) { say(event{Phase: what}) },
		Ready:    func() error { say(event{Ready: true}); return released() },
		Measure:  func(int) { say(event{Measure: true}) },
		Measured: func(int) { say(event{Ended: true}) },
		Rested:   func(users int) error { say(event{Rested: users}); return released() },
		Connect:  func(up, _ int) { say(event{Up: up}) },
		Progress: func(p report.Point) { say(event{Point: &p}) },
	})
	if err != nil {
		return err
	}
	say(event{Reports: reports})
	if failed != nil {
		return failed
	}
	return released() // as long as it is watched
}

// worker is one child process.
type worker struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	stderr bytes.Buffer
}

// told is an event and whose it is; err ends the worker.
type told struct {
	n int
	event
	err error
}

// MeasureMany is Measure by n worker processes, each with its share of the users and of the rates;
// their reports are merged. command starts a worker: it must call Work.
func MeasureMany(ctx context.Context, o Options, tokens TokenSource, n int, command func(context.Context) *exec.Cmd,
	servers Servers, h Hooks) ([]*report.Report, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &parent{h: h, n: n, events: make(chan told, 16*n), up: make([]int, n), points: make([]*report.Point, n), reports: make([][]*report.Report, n)}
	var pids []int
	first, run := o.FirstUser, o.Run
	for i := range n {
		share := o
		share.FirstUser = first
		share.Users = o.Users/n + btoi(i < o.Users%n)
		first += share.Users
		if run != "" {
			share.Run = fmt.Sprintf("%s%d", run, i)
		}
		share.Rates = nil
		for _, r := range o.Rates {
			share.Rates = append(share.Rates, r.split(n))
		}
		share.ConnectRate = o.ConnectRate / float64(n)
		w, err := p.spawn(ctx, i, command(ctx), Job{Options: share, Tokens: tokens})
		if err != nil {
			return nil, err
		}
		p.workers = append(p.workers, w)
		pids = append(pids, w.cmd.Process.Pid)
	}
	var err error
	if p.w, err = watch(servers, pids); err != nil {
		return nil, err
	}
	defer p.w.s.Stop()
	if err := p.follow(); err != nil {
		return nil, err
	}
	return p.merge(o.Rates)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// parent follows its workers. Everything is the caller's goroutine's.
type parent struct {
	h       Hooks
	n       int
	w       *watcher
	workers []*worker
	events  chan told

	ready, rested, users   int
	reported               int
	measuring, ended, left int
	up                     []int
	points                 []*report.Point
	reports                [][]*report.Report
	phase                  string
}

func (p *parent) spawn(ctx context.Context, n int, cmd *exec.Cmd, job Job) (*worker, error) {
	w := &worker{cmd: cmd}
	cmd.Stderr = &w.stderr
	var err error
	if w.in, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	line, err := json.Marshal(job)
	if err != nil {
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	if _, err := w.in.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("start a worker: %w", err)
	}
	go func() {
		dec := json.NewDecoder(out)
		for {
			var e event
			err := dec.Decode(&e)
			if err == nil {
				select {
				case p.events <- told{n: n, event: e}:
					continue
				case <-ctx.Done():
				}
			}
			if werr := cmd.Wait(); werr != nil {
				err = fmt.Errorf("worker %d: %w: %s", n+1, werr, bytes.TrimSpace(w.stderr.Bytes()))
			} else {
				err = io.EOF
			}
			select {
			case p.events <- told{n: n, err: err}:
			case <-ctx.Done():
			}
			return
		}
	}()
	return w, nil
}

func (p *parent) follow() error {
	for p.left = p.n; p.left > 0; {
		e := <-p.events
		switch {
		case errors.Is(e.err, io.EOF):
			p.left--
		case e.err != nil:
			return e.err
		default:
			if err := p.on(e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *parent) on(e told) error {
	switch {
	case e.Phase != "":
		if e.Phase != p.phase {
			p.phase = e.Phase
			if e.Phase == phaseLoad {
				p.w.s.Restart(time.Now())
			}
			if p.h.Phase != nil {
				p.h.Phase(e.Phase)
			}
		}
	case e.Ready:
		if p.ready++; p.ready == p.n {
			if p.h.Ready != nil {
				if err := p.h.Ready(); err != nil {
					return err
				}
			}
			return p.release()
		}
	case e.Rested > 0:
		p.users += e.Rested
		if p.rested++; p.rested == p.n {
			p.w.rest(p.users)
			p.rested, p.users = 0, 0
			return p.release()
		}
	case e.Measure:
		if p.measuring++; p.measuring == 1 {
			p.w.s.Mark()
		}
	case e.Ended:
		if p.ended++; p.ended == p.n {
			p.w.measured()
			p.measuring, p.ended = 0, 0
		}
	case e.Point != nil:
		p.points[e.n] = e.Point
		if e.n == 0 && p.h.Progress != nil {
			p.h.Progress(report.MergePoints(p.points))
		}
	case e.Reports != nil:
		p.reports[e.n] = e.Reports
		if p.reported++; p.reported == p.n {
			return p.release()
		}
	case e.Up > 0:
		p.up[e.n] = e.Up
		if e.n == 0 && p.h.Connect != nil {
			sum := 0
			for _, up := range p.up {
				sum += up
			}
			p.h.Connect(sum, 0)
		}
	}
	return nil
}

func (p *parent) release() error {
	for i, w := range p.workers {
		if _, err := w.in.Write([]byte("\n")); err != nil {
			return fmt.Errorf("release worker %d: %w", i+1, err)
		}
	}
	return nil
}

func (p *parent) merge(rates []Rate) ([]*report.Report, error) {
	var out []*report.Report
	for stage := range p.reports[0] {
		var parts []*report.Report
		for i, r := range p.reports {
			if stage >= len(r) {
				return out, fmt.Errorf("worker %d has no report of stage %d", i+1, stage+1)
			}
			parts = append(parts, r[stage])
		}
		r, err := report.Merge(parts)
		if err != nil {
			return out, err
		}
		r.Options["processes"] = p.n
		if _, byRate := r.Options["rate"]; byRate && stage < len(rates) && parts[0].Options["rate"] == rates[stage].split(p.n).String() {
			r.Options["rate"] = rates[stage].String()
		}
		out = append(out, r)
	}
	return out, p.w.finish(out)
}
