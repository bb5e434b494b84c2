// Command im-gateway is the gateway: clients connect to it by WebSocket and call its HTTP API.
//
// Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage or configuration.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"im-gateway/engine"
)

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// abortWait is how long an aborted gateway may take to return.
const abortWait = 2 * time.Second

func main() {
	// Two of the stop are told apart: room for both. Of hangups one that is to come serves all.
	in := signals{stop: make(chan os.Signal, 2), reload: make(chan os.Signal, 1)}
	signal.Notify(in.stop, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(in.reload, syscall.SIGHUP)
	engine.LimitMemory()
	engine.PaceGC()
	os.Exit(run(os.Args[1:], os.Environ(), os.Stdout, os.Stderr, in, start))
}

// signals are what comes from outside while the gateway runs.
type signals struct{ stop, reload chan os.Signal }

// gateway is the engine as run needs it.
type gateway interface {
	// Run returns when the gateway has stopped; it drains when ctx ends.
	Run(ctx context.Context) error
	// Abort makes Run return at once.
	Abort()
	// Reload asks for the configuration to be loaded again.
	Reload()
}

func start(c *engine.Loaded, l zerolog.Logger) (gateway, error) { return engine.New(c, l) }

// run does what the command line asks for and returns the exit code.
func run(args, environ []string, stdout, stderr io.Writer, in signals,
	start func(*engine.Loaded, zerolog.Logger) (gateway, error)) int {
	if len(args) > 0 && args[0] == "ctl" {
		return runCtl(args[1:], environ, stdout, stderr, in.stop)
	}
	cmd, err := parse(args)
	if err != nil {
		fmt.Fprintf(stderr, "im-gateway: %v\nTry: im-gateway -h\n", err)
		return exitUsage
	}
	switch cmd.verb {
	case verbHelp:
		return finish(stderr, usage(stdout))
	case verbVersion:
		_, err := fmt.Fprintln(stdout, "im-gateway", engine.BuildInfo())
		return finish(stderr, err)
	case verbReference:
		return finish(stderr, engine.WriteReference(stdout))
	}
	loaded, err := engine.Load(engine.Sources{File: cmd.file, Environ: environ, Flags: cmd.flags})
	if err != nil {
		fmt.Fprintf(stderr, "im-gateway: %v\n", err)
		return exitUsage
	}
	switch cmd.verb {
	case verbPrint:
		return finish(stderr, loaded.Print(stdout))
	case verbCheck:
		for _, w := range loaded.Config.Warnings() {
			fmt.Fprintln(stderr, "warning:", w)
		}
		_, err := fmt.Fprintln(stdout, "the configuration is good")
		return finish(stderr, err)
	}
	logger, err := engine.NewLogger(stderr, loaded.Config.Log)
	if err != nil {
		return finish(stderr, err)
	}
	for _, w := range loaded.Config.Warnings() {
		logger.Warn().Msg(w)
	}
	gw, err := start(loaded, logger)
	if err != nil {
		logger.Error().Err(err).Msg("not started")
		return exitFailed
	}
	return serve(gw, logger, in)
}

func finish(stderr io.Writer, err error) int {
	if err != nil {
		fmt.Fprintf(stderr, "im-gateway: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// serve runs the gateway: the first signal to stop drains it, the second stops it at once.
func serve(gw gateway, logger zerolog.Logger, in signals) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- gw.Run(ctx) }()
	for stopping := false; ; {
		select {
		case err := <-done:
			return ended(logger, err)
		case <-in.reload:
			gw.Reload()
			continue
		case s := <-in.stop:
			if !stopping {
				logger.Info().Stringer("signal", s).Msg("stopping; a second signal stops at once")
				cancel()
				stopping = true
				continue
			}
			logger.Warn().Stringer("signal", s).Msg("stopping at once: what is under way is given up")
			gw.Abort()
		}
		break
	}
	late := time.NewTimer(abortWait)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
	}
	return exitFailed
}

func ended(logger zerolog.Logger, err error) int {
	if err != nil && !errors.Is(err, context.Canceled) {
		logger.Error().Err(err).Msg("stopped by a failure")
		return exitFailed
	}
	logger.Info().Msg("stopped")
	return exitOK
}
