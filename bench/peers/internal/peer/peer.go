// Package peer is what the peers' processes have in common.
package peer

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Main runs one peer until SIGINT or SIGTERM ends ctx; an error exits with 1.
func Main(run func(ctx context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Ready says on stdout that clients may connect.
func Ready(addr string) { fmt.Println("listening on", addr) }
