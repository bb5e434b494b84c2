// Command rawwrite measures the floor of a fan-out: plain write(2) of one frame to N connections in
// a loop on one thread. It accepts the connections of a reader, a second process that it starts
// from its own binary, writes -rounds times one frame to each, pausing between, and prints one JSON
// object with the CPU (user and system, getrusage) per write.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

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
	conns := flag.Int("conns", 500, "connections")
	rounds := flag.Int("rounds", 200, "frames to each connection")
	size := flag.Int("size", 200, "bytes of a frame")
	pause := flag.Duration("pause", 20*time.Millisecond, "pause between rounds, in which the reader catches up")
	read := flag.String("read", "", "be the reader: connect -conns times to this address and read")
	flag.Parse()
	var err error
	if *read != "" {
		err = reader(ctx, *read, *conns)
	} else {
		err = write(ctx, *addr, *conns, *rounds, *size, *pause)
	}
	if err != nil {
		return fmt.Errorf("rawwrite: %w", err)
	}
	return nil
}

func reader(ctx context.Context, addr string, n int) error {
	ended := make(chan struct{}, n)
	for range n {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { _ = c.Close() })
		go func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 4096))
			ended <- struct{}{}
		}()
	}
	for range n {
		<-ended
	}
	return nil
}

func write(ctx context.Context, addr string, n, rounds, size int, pause time.Duration) (err error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = ln.Close() }()
	peer.Ready(ln.Addr().String())
	self, err := os.Executable()
	if err != nil {
		return err
	}
	child := exec.CommandContext(ctx, self, "-read", ln.Addr().String(), "-conns", fmt.Sprint(n))
	child.Stderr = os.Stderr
	if err := child.Start(); err != nil {
		return err
	}
	fds := make([]int, 0, n)
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		if werr := child.Wait(); err == nil {
			err = werr
		}
	}()
	for range n {
		fd, err := accept(ln)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	res, err := measure(ctx, fds, rounds, size, pause)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(res)
}

// accept returns a blocking descriptor that Go's poller knows nothing of.
func accept(ln net.Listener) (int, error) {
	c, err := ln.Accept()
	if err != nil {
		return -1, err
	}
	defer func() { _ = c.Close() }()
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

func measure(ctx context.Context, fds []int, rounds, size int, pause time.Duration) (result, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	frame := make([]byte, size)
	var busy time.Duration
	var cpu time.Duration
	const warmup = 10
	for i := range rounds + warmup {
		if i == warmup {
			busy, cpu = 0, 0
		}
		if err := ctx.Err(); err != nil {
			return result{}, err
		}
		c, t := threadCPU(), time.Now()
		for _, fd := range fds {
			if n, err := syscall.Write(fd, frame); err != nil || n != size {
				return result{}, fmt.Errorf("wrote %d of %d bytes: %w", n, size, err)
			}
		}
		busy, cpu = busy+time.Since(t), cpu+threadCPU()-c
		time.Sleep(pause)
	}
	writes := rounds * len(fds)
	per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 / float64(writes) }
	return result{Conns: len(fds), FrameBytes: size, Writes: writes, CPU: per(cpu), Wall: per(busy)}, nil
}

// threadCPU is the user and system time of this thread.
func threadCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
