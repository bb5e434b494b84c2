// Command rawwrite measures the floor of a fan-out: plain write(2) of one frame to some of N WebSocket
// connections in a loop on one thread. It waits for N clients, which need only read, then writes -rounds
// times one frame to -targets of them, -rate times a second, and prints one JSON object with the CPU (user
// and system) per write. It keeps the connections until it is told to end.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/gobwas/ws"
	"golang.org/x/sys/unix"

	"im-gateway/bench/peers/internal/peer"
)

func main() { peer.Main(run) }

type result struct {
	Conns      int     `json:"conns"`
	FrameBytes int     `json:"frame_bytes"`
	Writes     int     `json:"writes"`
	CPU        float64 `json:"cpu_us_per_write"`
	Wall       float64 `json:"wall_us_per_write"`
}

func run(ctx context.Context) error {
	addr := flag.String("addr", "127.0.0.1:0", "address to listen on")
	conns := flag.Int("conns", 10000, "clients to wait for")
	targets := flag.Int("targets", 500, "connections written to in a round")
	rounds := flag.Int("rounds", 120, "rounds that are measured, after ten that are not")
	rate := flag.Float64("rate", 20, "rounds per second")
	size := flag.Int("size", 256, "bytes of a frame's payload")
	flag.Parse()
	if *targets < 1 || *targets > *conns || *rate <= 0 {
		return errors.New("rawwrite: -targets must be 1 to -conns, and -rate more than 0")
	}
	if err := serve(ctx, *addr, *conns, *targets, *rounds, *rate, *size); err != nil {
		return fmt.Errorf("rawwrite: %w", err)
	}
	return nil
}

func serve(ctx context.Context, addr string, n, targets, rounds int, rate float64, size int) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = ln.Close() }()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	peer.Ready(ln.Addr().String())
	fds := make([]int, 0, n)
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for len(fds) < n {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if fd, err := upgrade(c); err == nil { // else it was no client
			fds = append(fds, fd)
		}
	}
	frame, err := ws.CompileFrame(ws.NewTextFrame(make([]byte, size)))
	if err != nil {
		return err
	}
	res, err := measure(ctx, fds, targets, rounds, rate, frame)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(res); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// upgrade returns a blocking descriptor that Go's poller knows nothing of.
func upgrade(c net.Conn) (int, error) {
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return -1, err
	}
	if _, err := ws.Upgrade(c); err != nil {
		return -1, err
	}
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		return -1, err
	}
	defer func() { _ = f.Close() }()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.SetNonblock(fd, false)
}

func measure(ctx context.Context, fds []int, targets, rounds int, rate float64, frame []byte) (result, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const warmup = 10
	var busy, cpu time.Duration
	pace := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer pace.Stop()
	for i := range rounds + warmup {
		if i == warmup {
			busy, cpu = 0, 0
		}
		rand.Shuffle(len(fds), func(a, b int) { fds[a], fds[b] = fds[b], fds[a] })
		select {
		case <-pace.C:
		case <-ctx.Done():
			return result{}, ctx.Err()
		}
		c, t := threadCPU(), time.Now()
		for _, fd := range fds[:targets] {
			if n, err := unix.Write(fd, frame); err != nil || n != len(frame) {
				return result{}, fmt.Errorf("wrote %d of %d bytes: %w", n, len(frame), err)
			}
		}
		busy, cpu = busy+time.Since(t), cpu+threadCPU()-c
	}
	writes := rounds * targets
	per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 / float64(writes) }
	return result{Conns: len(fds), FrameBytes: len(frame), Writes: writes, CPU: per(cpu), Wall: per(busy)}, nil
}

// threadCPU is the user and system time of this thread, to the nanosecond: getrusage may count in ticks.
func threadCPU() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
