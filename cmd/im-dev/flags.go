package main

import (
	"errors"
	"flag"
	"fmt"
	"io"

	"im-gateway/engine"
)

// The addresses that are used unless others are asked for.
const (
	defaultHTTP = "127.0.0.1:8080"
	defaultPage = "127.0.0.1:8090"
)

// options is a parsed command line.
type options struct {
	help bool

	page, logic                    string // addresses
	kafkaPort, etcdPort, redisPort int
	data                           string
	external                       bool
	config                         string
	demo                           bool
	keys                           map[string]string // keys of the gateway's configuration
}

const usage = `im-dev runs the whole system in one process: Kafka, etcd and Redis (embedded, on loopback), a
reference im-logic, the gateway and a demo page. It prints what to do next.

Usage: im-dev [flags]

  -http ADDR        the gateway: WebSocket and HTTP            [127.0.0.1:8080]
  -page ADDR        the demo page                              [127.0.0.1:8090]
  -admin ADDR       health, metrics, profiles                  [127.0.0.1:8081]
  -grpc ADDR        the gateway's gRPC server                  [127.0.0.1:9080]
  -logic ADDR       im-logic's gRPC server                     [a free port]
  -kafka-port PORT  Kafka, on 127.0.0.1                        [a free port]
  -etcd-port PORT   etcd, on 127.0.0.1                         [a free port]
  -redis-port PORT  Redis, on 127.0.0.1                        [a free port]
  -data DIR         keep Kafka's and etcd's data in DIR        [kept nowhere]
  -demo=false       without the demo users alice and bob
  -external         use real Kafka, etcd and Redis, given by -config, IM_... variables and flags as
                    im-gateway takes them; still with the reference im-logic and the page
  -config FILE      the gateway's configuration, with -external
  -KEY VALUE        any key of the gateway's configuration, such as -websocket.heartbeat 5s, or
                    -tracing.endpoint 127.0.0.1:4317 to have every message traced

Port 0 stands for a free one. An address without a host, such as :8080, is reachable from other
machines; give -http and -page so to open the page on a phone.
The first Ctrl-C drains and stops, the second stops at once.
`

// parse reads the command line; its errors fit on one line.
func parse(args []string) (options, error) {
	o := options{keys: map[string]string{}}
	set := flag.NewFlagSet("im-dev", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.Usage = func() {}
	for name, key := range addressFlags {
		set.Func(name, "", func(v string) error { o.keys[key] = v; return nil })
	}
	set.StringVar(&o.page, "page", defaultPage, "")
	set.StringVar(&o.logic, "logic", "127.0.0.1:0", "")
	set.IntVar(&o.kafkaPort, "kafka-port", 0, "")
	set.IntVar(&o.etcdPort, "etcd-port", 0, "")
	set.IntVar(&o.redisPort, "redis-port", 0, "")
	set.StringVar(&o.data, "data", "", "")
	set.BoolVar(&o.external, "external", false, "")
	set.StringVar(&o.config, "config", "", "")
	set.BoolVar(&o.demo, "demo", true, "")
	keys, err := engine.Keys()
	if err != nil {
		return o, err
	}
	for _, k := range keys {
		take := func(v string) error { o.keys[k.Name] = v; return nil }
		switch {
		case k.Secret: // every user of a machine can read flags
		case k.Bool:
			set.BoolFunc(k.Name, "", take)
		default:
			set.Func(k.Name, "", take)
		}
	}
	err = set.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		o.help = true
		return o, nil
	case err != nil:
		return o, err
	case set.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", set.Arg(0))
	case o.config != "" && !o.external:
		return o, errors.New("-config needs -external: the embedded servers need no configuration")
	case o.external && (o.kafkaPort != 0 || o.etcdPort != 0 || o.redisPort != 0 || o.data != ""):
		return o, errors.New("-kafka-port, -etcd-port, -redis-port and -data are of the embedded servers, not of -external")
	}
	for name, port := range map[string]int{"kafka": o.kafkaPort, "etcd": o.etcdPort, "redis": o.redisPort} {
		if port < 0 || port > 65535 {
			return o, fmt.Errorf("-%s-port %d: not a port", name, port)
		}
	}
	return o, nil
}

// addressFlags are short names of keys.
var addressFlags = map[string]string{"http": "http.addr", "admin": "admin.addr", "grpc": "grpc.addr"}
