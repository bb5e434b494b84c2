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
	// Two signals are told apart: room for both.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	engine.LimitMemory()
	engine.PaceGC()
	os.Exit(run(os.Args[1:], os.Environ(), os.Stdout, os.Stderr, signals, start))
}

// gateway is the engine as run needs it.
type gateway interface {
	// Run returns when the gateway has stopped; it drains when ctx ends.
	Run(ctx context.Context) error
	// Abort makes Run return at once.
	Abort()
}

func start(c engine.Config, l zerolog.Logger) (gateway, error) { return engine.New(c, l) }

// run does what the command line asks for and returns the exit code.
func run(args, environ []string, stdout, stderr io.Writer, signals <-chan os.Signal,
	start func(engine.Config, zerolog.Logger) (gateway, error)) int {
	if len(args) > 0 && args[0] == "ctl" {
		return runCtl(args[1:], environ, stdout, stderr, signals)
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
	gw, err := start(loaded.Config, logger)
	if err != nil {
		logger.Error().Err(err).Msg("not started")
		return exitFailed
	}
	return serve(gw, logger, signals)
}

func finish(stderr io.Writer, err error) int {
	if err != nil {
		fmt.Fprintf(stderr, "im-gateway: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// serve runs the gateway: the first signal drains it, the second stops it at once.
func serve(gw gateway, logger zerolog.Logger, signals <-chan os.Signal) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- gw.Run(ctx) }()
	var err error
	select {
	case err = <-done:
		return ended(logger, err)
	case s := <-signals:
		logger.Info().Stringer("signal", s).Msg("stopping; a second signal stops at once")
		cancel()
	}
	select {
	case err = <-done:
		return ended(logger, err)
	case s := <-signals:
		logger.Warn().Stringer("signal", s).Msg("stopping at once: what is under way is given up")
		gw.Abort()
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
