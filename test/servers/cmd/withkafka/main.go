// Command withkafka runs a command beside a real Apache Kafka that it starts and ends:
//
//	go run ./test/servers/cmd/withkafka go test -tags realkafka ./broker
//
// The command finds the broker, host:port, in IM_TEST_KAFKA, and the directory of Kafka's jars in
// IM_TEST_KAFKA_LIBS. The exit code is the command's.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"im-gateway/test/servers"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "withkafka:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 0 {
		return errors.New("usage: withkafka COMMAND [ARGUMENT...]")
	}
	dir, err := os.MkdirTemp("", "withkafka-")
	if err != nil {
		return fmt.Errorf("temporary directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	k, err := servers.StartKafka(ctx, dir)
	if err != nil {
		return err
	}
	defer k.Kill()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "IM_TEST_KAFKA="+k.Broker, "IM_TEST_KAFKA_LIBS="+k.Libs)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	return nil
}
