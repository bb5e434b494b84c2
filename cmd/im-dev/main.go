// Command im-dev is the whole system in one process: Kafka, etcd, Redis (embedded), the reference
// im-logic, the gateway and a demo page. With -external the servers are real ones.
//
// Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage or configuration.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/rs/zerolog"

	"im-gateway/engine"
)

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	// Two signals are told apart: room for both.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	os.Exit(run(os.Args[1:], os.Environ(), os.Stdout, os.Stderr, signals, start))
}

// gateway is the engine as im-dev needs it.
type gateway interface {
	// Run returns when the gateway has stopped; it drains when ctx ends.
	Run(ctx context.Context) error
	// Abort makes Run return at once.
	Abort()
	// Ready is closed when clients can come.
	Ready() <-chan struct{}
	GatewayID() string
}

func start(c engine.Config, l zerolog.Logger) (gateway, error) { return engine.New(engine.Fixed(c), l) }
