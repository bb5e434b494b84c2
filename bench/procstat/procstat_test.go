package procstat

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"im-gateway/bench/report"
)

const childEnv = "PROCSTAT_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// child burns CPU for each line that it reads, and answers how much, in seconds. It ends with its
// input. The threads that burn end: their time must not be lost.
func child() {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		before := used()
		for used()-before < 0.03 {
			var wg sync.WaitGroup
			wg.Go(func() {
				runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
				for i := range 2_000_000 {
					_ = math.Sqrt(float64(i))
				}
			})
			wg.Wait()
		}
		fmt.Println(used() - before)
	}
}

func used() float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

type helper struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(t *testing.T) *helper {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h := &helper{t, cmd, in, bufio.NewReader(out)}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return h
}

// burn lets the child use CPU and returns how much it says it used.
func (h *helper) burn() (seconds float64) {
	h.t.Helper()
	if _, err := io.WriteString(h.in, "burn\n"); err != nil {
		h.t.Fatal(err)
	}
	line, err := h.out.ReadString('\n')
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &seconds); err != nil {
		h.t.Fatalf("the child said %q: %v", line, err)
	}
	return seconds
}

// die kills the child and returns when it is dead, before anybody has waited for it.
func (h *helper) die() {
	h.t.Helper()
	if err := h.cmd.Process.Kill(); err != nil {
		h.t.Fatal(err)
	}
	if err := unix.Waitid(unix.P_PID, h.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		h.t.Fatal(err)
	}
}

func start(t *testing.T, names []string, pids ...int) *Sampler {
	t.Helper()
	s, err := Start(names, pids)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}

func TestCPUOfTheMeasuredTime(t *testing.T) {
	h := startChild(t)
	h.burn() // before the measured time: not to count
	s := start(t, []string{"child"}, h.cmd.Process.Pid)
	s.Mark()
	burned := h.burn()
	s.Unmark()
	after := h.burn() // nor this
	procs, err := s.Processes()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.in.Close(), h.cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	total := (h.cmd.ProcessState.UserTime() + h.cmd.ProcessState.SystemTime()).Seconds()
	p := procs[0]
	const rounding = 1e-5 // getrusage says microseconds
	if p.CPUSeconds < burned-rounding || p.CPUSeconds > total-after-burned/2 {
		t.Errorf("%.6f s of CPU; the child used %.6f s in the measured time and %.6f s in all", p.CPUSeconds, burned, total)
	}
	if p.Name != "child" || p.PID != h.cmd.Process.Pid {
		t.Errorf("watched %s (%d)", p.Name, p.PID)
	}
	if p.RSSStart <= 0 || p.RSSEnd <= 0 || p.RSSPeak < max(p.RSSStart, p.RSSEnd) || p.Anon <= 0 {
		t.Errorf("memory: start %d, end %d, peak %d, anonymous %d", p.RSSStart, p.RSSEnd, p.RSSPeak, p.Anon)
	}
	if len(p.Samples) < 3 { // of Start, Mark and Unmark
		t.Errorf("%d samples", len(p.Samples))
	}
	var area, at float64
	for _, x := range p.Samples[1:] {
		if x.T < at {
			t.Errorf("a sample of %.6f s follows one of %.6f s", x.T, at)
		}
		area, at = area+x.CPU, x.T
	}
	if area == 0 {
		t.Error("no sample shows CPU in use")
	}
}

func TestRestartForgets(t *testing.T) {
	h := startChild(t)
	s := start(t, []string{"child"}, h.cmd.Process.Pid)
	s.Mark()
	h.burn()
	s.Unmark()
	s.Restart(time.Now())
	s.Unmark() // of nothing
	procs, err := s.Processes()
	if err != nil {
		t.Fatal(err)
	}
	p := procs[0]
	if p.CPUSeconds != 0 || p.RSSStart != 0 || p.RSSPeak != 0 || p.RSSEnd != 0 || p.Anon != 0 || p.Name != "child" || p.PID != h.cmd.Process.Pid {
		t.Errorf("after Restart: %+v", p)
	}
}

func TestProcessThatEnds(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(t *testing.T, s *Sampler, h *helper)
	}{
		{"dead, not waited for", func(_ *testing.T, _ *Sampler, h *helper) { h.die() }},
		{"gone", func(t *testing.T, _ *Sampler, h *helper) {
			if err := errors.Join(h.in.Close(), h.cmd.Wait()); err != nil {
				t.Fatal(err)
			}
		}},
		{"its pid is another's", func(_ *testing.T, s *Sampler, _ *helper) {
			s.mu.Lock()
			s.procs[0].born--
			s.mu.Unlock()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := startChild(t)
			s := start(t, []string{"server", "bench"}, h.cmd.Process.Pid, os.Getpid())
			s.Mark()
			tc.end(t, s, h)
			s.Unmark()
			procs, err := s.Processes()
			if !errors.Is(err, ErrEnded) || !strings.Contains(err.Error(), "server") || strings.Contains(err.Error(), "bench (") {
				t.Errorf("error %v; want one that says that the server ended", err)
			}
			if len(procs) != 2 || procs[1].RSSEnd == 0 {
				t.Errorf("the other process was not watched to the end: %+v", procs)
			}
			s.Restart(time.Now())
			if rss, err := s.RSS(1); rss != 0 || !errors.Is(err, ErrEnded) {
				t.Errorf("of a process that ended: %d bytes, %v", rss, err)
			}
			if rss, err := s.RSS(2); rss == 0 || !errors.Is(err, ErrEnded) {
				t.Errorf("of both: %d bytes, %v", rss, err)
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	h := startChild(t)
	if err := errors.Join(h.in.Close(), h.cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	if _, err := Start([]string{"gone"}, []int{h.cmd.Process.Pid}); !errors.Is(err, ErrEnded) {
		t.Errorf("a process that is not there: %v", err)
	}
	if _, err := Start(nil, []int{os.Getpid()}); err == nil {
		t.Error("a process without a name was taken")
	}
}

func TestStopTwice(t *testing.T) {
	s := start(t, []string{"self"}, os.Getpid())
	s.Stop()
	s.Stop()
}

func TestSamplesAreBounded(t *testing.T) {
	s := start(t, []string{"self"}, os.Getpid())
	s.Stop() // only the looks below
	w := s.procs[0]
	w.measured = true
	for range 3 * maxSamples {
		if err := w.look(s.start); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(w.Samples); n >= maxSamples || n < maxSamples/2 || w.every != 4 {
		t.Errorf("%d samples, one of %d looks", n, w.every)
	}
	for _, x := range w.Samples {
		if x.RSS > w.RSSPeak {
			t.Fatalf("a sample of %d bytes is above the peak, %d", x.RSS, w.RSSPeak)
		}
	}
}

func TestHalve(t *testing.T) {
	for _, tc := range []struct {
		name     string
		in, want []report.ProcSample
	}{
		{"even", []report.ProcSample{{T: 1, CPU: 1, RSS: 9}, {T: 3, CPU: 0.25, RSS: 5}, {T: 4, CPU: 2, RSS: 8}, {T: 5, CPU: 1, RSS: 7}},
			[]report.ProcSample{{T: 3, CPU: 0.5, RSS: 9}, {T: 5, CPU: 1.5, RSS: 7}}},
		{"odd", []report.ProcSample{{T: 1, CPU: 1, RSS: 1}, {T: 2, CPU: 0, RSS: 2}, {T: 3, CPU: 4, RSS: 3}},
			[]report.ProcSample{{T: 2, CPU: 0.5, RSS: 2}, {T: 3, CPU: 4, RSS: 3}}},
		{"one", []report.ProcSample{{T: 1, CPU: 1, RSS: 1}}, []report.ProcSample{{T: 1, CPU: 1, RSS: 1}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := halve(append([]report.ProcSample(nil), tc.in...))
			if fmt.Sprint(got) != fmt.Sprint(tc.want) {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
}
