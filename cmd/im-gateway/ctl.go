package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"im-gateway/codec/gatewaypb"
	"im-gateway/engine"
)

// ctl is one run of `im-gateway ctl`: a call of AdminService, and its answer in words or as JSON.
type ctl struct {
	stdout, stderr io.Writer
	environ        []string

	// Flags.
	addr, config, tokenFile string
	tokenInFlag             bool
	output                  string // text or json
	timeout                 time.Duration
	tls                     ctlTLS
	session, reason         string        // of kick
	limit                   int           // of top
	window                  time.Duration // of top
}

// ctlCommand is one thing to ask for.
type ctlCommand struct {
	name, args, does string
	least, most      int // arguments
	flags            func(*flag.FlagSet, *ctl)
	call             func(context.Context, *ctl, gatewaypb.AdminServiceClient, []string) (proto.Message, error)
	show             func(io.Writer, proto.Message)
	failed           func(proto.Message) error // what an answer that came says; nil: nothing is wrong
}

// ctlCommands are in the order of the help text.
var ctlCommands = []ctlCommand{
	{
		name: "status", does: "the gateway, what it waits for, and its dependencies", show: showStatus,
		call: func(ctx context.Context, _ *ctl, c gatewaypb.AdminServiceClient, _ []string) (proto.Message, error) {
			return c.Status(ctx, &gatewaypb.StatusRequest{})
		},
	},
	{
		name: "ledger", does: "what became of everything that was taken in", show: showLedger,
		call: func(ctx context.Context, _ *ctl, c gatewaypb.AdminServiceClient, _ []string) (proto.Message, error) {
			return c.Ledger(ctx, &gatewaypb.LedgerRequest{})
		},
	},
	{
		name: "queues", does: "how full each queue is, and how often it was full", show: showQueues,
		call: func(ctx context.Context, _ *ctl, c gatewaypb.AdminServiceClient, _ []string) (proto.Message, error) {
			return c.Queues(ctx, &gatewaypb.QueuesRequest{})
		},
	},
	{
		name: "top", does: "measure for a while who sends and who is sent most", show: showTalkers,
		flags: func(set *flag.FlagSet, c *ctl) {
			set.IntVar(&c.limit, "n", 10, "users in each list, 1 to 100")
			set.DurationVar(&c.window, "window", 3*time.Second, "how long to measure, 100ms to 30s")
		},
		call: func(ctx context.Context, c *ctl, client gatewaypb.AdminServiceClient, _ []string) (proto.Message, error) {
			return client.TopTalkers(ctx, &gatewaypb.TopTalkersRequest{Limit: int32(c.limit), WindowMs: int32(c.window.Milliseconds())})
		},
	},
	{
		name: "find", args: "USER", least: 1, most: 1, show: showFound, failed: foundNothing,
		does: "a user's sessions, here and (as Redis says) elsewhere",
		call: func(ctx context.Context, _ *ctl, c gatewaypb.AdminServiceClient, args []string) (proto.Message, error) {
			return c.FindUser(ctx, &gatewaypb.FindUserRequest{UserId: args[0]})
		},
	},
	{
		name: "kick", args: "USER", least: 1, most: 1, show: showKicked, failed: kickedNobody,
		does: "close a user's sessions on this gateway (4501)",
		flags: func(set *flag.FlagSet, c *ctl) {
			set.StringVar(&c.session, "session", "", "only this session; find lists them")
			set.StringVar(&c.reason, "reason", "", "shown to the client, at most 100 bytes")
		},
		call: func(ctx context.Context, c *ctl, client gatewaypb.AdminServiceClient, args []string) (proto.Message, error) {
			return client.KickUser(ctx, &gatewaypb.KickUserRequest{UserId: args[0], SessionId: c.session, Reason: c.reason})
		},
	},
	{
		name: "drain", does: "send the clients elsewhere and stop, as SIGTERM does; does not wait for it",
		show: func(w io.Writer, _ proto.Message) { fmt.Fprintln(w, "draining; the gateway stops when it is done") },
		call: func(ctx context.Context, _ *ctl, c gatewaypb.AdminServiceClient, _ []string) (proto.Message, error) {
			return c.Drain(ctx, &gatewaypb.DrainRequest{})
		},
	},
	{
		name: "log-level", args: "[LEVEL]", most: 1, show: showLogLevel,
		does: "show the log level, or set it to trace, debug, info, warn or error",
		call: func(ctx context.Context, _ *ctl, c gatewaypb.AdminServiceClient, args []string) (proto.Message, error) {
			if len(args) == 0 {
				return c.GetLogLevel(ctx, &gatewaypb.GetLogLevelRequest{})
			}
			return c.SetLogLevel(ctx, &gatewaypb.SetLogLevelRequest{Level: args[0]})
		},
	},
}

const ctlUsage = `im-gateway ctl looks at a running gateway and acts on it, through its gRPC port.

Usage:
  im-gateway ctl COMMAND [flags]

Commands:
%s
kick, drain and log-level LEVEL need the token that the gateway has as admin.token. The others need it, or
grpc.token, only where grpc.token is configured. Tokens are not taken from flags.

Flags:
  -addr HOST:PORT     the gateway's gRPC port [grpc.addr of the configuration, else %s]
  -config FILE        take address, token and TLS from this file, as the gateway itself does
  -token-file FILE    the token [IM_ADMIN_TOKEN or IM_ADMIN_TOKEN_FILE, else IM_GRPC_TOKEN or IM_GRPC_TOKEN_FILE]
  -o text|json        how to write the answer [text]
  -timeout DURATION   how long to wait for the gateway [10s]
  -tls                use TLS, with the system's authorities [grpc.tls of the configuration]
  -tls-ca FILE        the same, with these authorities (PEM)
  -tls-cert FILE, -tls-key FILE   the client's certificate, where the gateway asks for one
  -tls-server-name NAME           the name in the gateway's certificate, where it is not the host of -addr

Exit codes: 0 done, 1 failed, or no such user here, 2 wrong usage or configuration.

Examples:
  im-gateway ctl status -config /etc/im-gateway/gateway.yaml
  im-gateway ctl queues -o json | jq '.queues[] | select(.depth * 2 > .bound)'
  IM_ADMIN_TOKEN_FILE=/etc/im-gateway/admin-token im-gateway ctl kick alice -reason "please log in again"
`

// usageError is what makes the exit code 2.
type usageError struct{ error }

// runCtl does what the arguments after `ctl` ask for and returns the exit code.
func runCtl(args, environ []string, stdout, stderr io.Writer, signals <-chan os.Signal) int {
	c := &ctl{stdout: stdout, stderr: stderr, environ: environ}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-signals:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := c.run(ctx, args)
	if usage := (usageError{}); errors.As(err, &usage) {
		fmt.Fprintf(stderr, "im-gateway ctl: %v\nTry: im-gateway ctl -h\n", err)
		return exitUsage
	}
	if err != nil {
		fmt.Fprintf(stderr, "im-gateway ctl: %v\n", err)
		return exitFailed
	}
	return exitOK
}

func (c *ctl) run(ctx context.Context, args []string) error {
	command, rest, err := c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return c.help(command)
	}
	if err != nil {
		return usageError{err}
	}
	conn, err := c.dial()
	if err != nil {
		return usageError{err}
	}
	defer func() { _ = conn.Close() }() // the answer has come, or never will
	ctx, cancel := context.WithTimeout(ctx, c.timeout+c.window)
	defer cancel()
	answer, err := command.call(ctx, c, gatewaypb.NewAdminServiceClient(conn), rest)
	if err != nil {
		return c.explain(err)
	}
	if err := c.write(command, answer); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	if command.failed != nil {
		return command.failed(answer)
	}
	return nil
}

// parse reads the command line: flags may stand before, between and after the command and its arguments.
func (c *ctl) parse(args []string) (command *ctlCommand, rest []string, err error) {
	set := flag.NewFlagSet("im-gateway ctl", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.Usage = func() {}
	c.flags(set)
	for {
		err := set.Parse(args)
		if c.tokenInFlag { // flag's own error would repeat it
			return nil, nil, errors.New("-token: every user of this machine can read flags; use -token-file or the environment")
		}
		if err != nil {
			return command, nil, err
		}
		if set.NArg() == 0 {
			break
		}
		word := set.Arg(0)
		args = set.Args()[1:]
		if command != nil {
			rest = append(rest, word)
			continue
		}
		if word == "help" {
			return nil, nil, flag.ErrHelp
		}
		i := slices.IndexFunc(ctlCommands, func(c ctlCommand) bool { return c.name == word })
		if i < 0 {
			return nil, nil, fmt.Errorf("%s: no such command; there are %s", word, strings.Join(ctlNames(), ", "))
		}
		command = &ctlCommands[i]
		if command.flags != nil {
			command.flags(set, c)
		}
	}
	switch {
	case command == nil:
		return nil, nil, fmt.Errorf("which command? there are %s", strings.Join(ctlNames(), ", "))
	case len(rest) < command.least || len(rest) > command.most:
		return command, nil, fmt.Errorf("%s: %d arguments given, want: %s", command.name, len(rest), cmp.Or(command.args, "none"))
	case c.output != "text" && c.output != "json":
		return command, nil, fmt.Errorf("-o %s: must be text or json", c.output)
	case c.timeout <= 0:
		return command, nil, fmt.Errorf("-timeout %s: must be positive", c.timeout)
	case command.name == "top" && (c.limit < 1 || c.limit > 100):
		return command, nil, fmt.Errorf("-n %d: must be 1 to 100", c.limit)
	case command.name == "top" && (c.window < 100*time.Millisecond || c.window > 30*time.Second):
		return command, nil, fmt.Errorf("-window %s: must be 100ms to 30s", c.window)
	}
	return command, rest, nil
}

func (c *ctl) flags(set *flag.FlagSet) {
	set.StringVar(&c.addr, "addr", "", "")
	set.StringVar(&c.config, "config", "", "")
	set.StringVar(&c.tokenFile, "token-file", "", "")
	set.Func("token", "", func(string) error {
		c.tokenInFlag = true
		return errSecret
	})
	set.StringVar(&c.output, "o", "text", "")
	set.DurationVar(&c.timeout, "timeout", 10*time.Second, "")
	set.BoolVar(&c.tls.enabled, "tls", false, "")
	set.StringVar(&c.tls.ca, "tls-ca", "", "")
	set.StringVar(&c.tls.cert, "tls-cert", "", "")
	set.StringVar(&c.tls.key, "tls-key", "", "")
	set.StringVar(&c.tls.serverName, "tls-server-name", "", "")
}

func ctlNames() (names []string) {
	for _, c := range ctlCommands {
		names = append(names, c.name)
	}
	return names
}

// help writes the help text, or that of one command.
func (c *ctl) help(command *ctlCommand) error {
	var b strings.Builder
	if command == nil {
		var list strings.Builder
		for _, k := range ctlCommands {
			fmt.Fprintf(&list, "  %-18s %s\n", strings.TrimSpace(k.name+" "+k.args), k.does)
		}
		fmt.Fprintf(&b, ctlUsage, list.String(), engine.DefaultGRPCAddr)
	} else {
		fmt.Fprintf(&b, "im-gateway ctl %s: %s\n\nUsage:\n  im-gateway ctl %s [flags]\n", command.name, command.does,
			strings.TrimSpace(command.name+" "+command.args))
		if command.flags != nil {
			b.WriteString("\nFlags:\n")
			set := flag.NewFlagSet("", flag.ContinueOnError)
			command.flags(set, &ctl{})
			set.VisitAll(func(f *flag.Flag) {
				text := f.Usage
				if f.DefValue != "" {
					text += " [" + f.DefValue + "]"
				}
				fmt.Fprintf(&b, "  -%-18s %s\n", f.Name, text)
			})
		}
		b.WriteString("\nFlags that all commands have: im-gateway ctl -h\n")
	}
	_, err := io.WriteString(c.stdout, b.String())
	return err
}
