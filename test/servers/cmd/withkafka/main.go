// Command withkafka runs a command beside a real Apache Kafka that it starts and ends:
//
//	go run ./test/servers/cmd/withkafka go test -tags realkafka ./broker
//
// The command finds the broker, host:port, in IM_TEST_KAFKA, the directory of Kafka's jars in
// IM_TEST_KAFKA_LIBS, and in IM_TEST_KAFKA_SASL, _USER and _PASSWORD the listener that asks for a login,
// and one. With -redis before the command there is a Redis, too, at IM_TEST_REDIS. The exit code is the command's.
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
	code, err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "withkafka:", err)
		code = 1
	}
	os.Exit(code)
}

// run returns the command's exit code; an error means that there was none.
func run(ctx context.Context, args []string) (code int, err error) {
	redis := len(args) > 0 && args[0] == "-redis"
	if redis {
		args = args[1:]
	}
	if len(args) == 0 {
		return 0, errors.New("usage: withkafka [-redis] COMMAND [ARGUMENT...]")
	}
	dir, err := os.MkdirTemp("", "withkafka-")
	if err != nil {
		return 0, fmt.Errorf("temporary directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	k, err := servers.StartKafka(ctx, dir)
	if err != nil {
		return 0, err
	}
	defer k.Kill()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "IM_TEST_KAFKA="+k.Broker, "IM_TEST_KAFKA_LIBS="+k.Libs,
		"IM_TEST_KAFKA_SASL="+k.SASLBroker, "IM_TEST_KAFKA_USER="+k.User, "IM_TEST_KAFKA_PASSWORD="+k.Password)
	if redis {
		r, err := servers.StartRedis(ctx, dir, "")
		if err != nil {
			return 0, err
		}
		defer r.Kill()
		cmd.Env = append(cmd.Env, "IM_TEST_REDIS="+r.Addr)
	}
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() > 0: // it has said why
		return exit.ExitCode(), nil
	case err != nil:
		return 0, fmt.Errorf("%s: %w", args[0], err)
	}
	return 0, nil
}
