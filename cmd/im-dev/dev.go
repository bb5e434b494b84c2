package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/rs/zerolog"

	"im-gateway/cmd/im-dev/embedded"
	"im-gateway/cmd/im-dev/logic"
	"im-gateway/cmd/im-dev/page"
	"im-gateway/engine"
)

const (
	// pageStop bounds the end of the page's server.
	pageStop = time.Second
	// abortWait is how long an aborted gateway may take to return.
	abortWait = 2 * time.Second
)

type startFunc func(engine.Config, zerolog.Logger) (gateway, error)

// run does what the command line asks for and returns the exit code.
func run(args, environ []string, stdout, stderr io.Writer, signals <-chan os.Signal, start startFunc) int {
	o, err := parse(args)
	if err != nil {
		fmt.Fprintf(stderr, "im-dev: %v\nTry: im-dev -h\n", err)
		return exitUsage
	}
	if o.help {
		_, err := io.WriteString(stdout, usage)
		return finish(stderr, err)
	}
	cfg, err := loadConfig(o, environ)
	if err != nil {
		fmt.Fprintf(stderr, "im-dev: %v\n", err)
		return exitUsage
	}
	logger, err := engine.NewLogger(stderr, cfg.Log)
	if err != nil {
		return finish(stderr, err)
	}
	d := &dev{o: o, cfg: cfg, stdout: stdout, logger: logger, signals: signals, start: start}
	return finish(stderr, d.run())
}

func finish(stderr io.Writer, err error) int {
	if err != nil {
		fmt.Fprintf(stderr, "im-dev: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// dev is one run of the whole system.
type dev struct {
	o       options
	cfg     engine.Config
	stdout  io.Writer
	logger  zerolog.Logger
	signals <-chan os.Signal
	start   startFunc
}

// errAborted is returned by run when a second signal came.
var errAborted = errors.New("stopped at once: what was under way is given up")

// run starts the parts in order, each once the one before is there, and stops them in the opposite
// order: gateway, page, im-logic, servers.
func (d *dev) run() (err error) {
	if err := d.choosePorts(); err != nil {
		return err
	}
	ctx, interrupt := context.WithCancel(context.Background())
	defer interrupt()

	if !d.o.external {
		servers, err := d.startServers(ctx)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, servers.Close()) }()
		useEmbedded(&d.cfg, servers)
	}
	im, err := d.startLogic(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.stop()) }()
	stopPage, err := d.startPage()
	if err != nil {
		return err
	}
	defer stopPage()
	return d.runGateway(im.done)
}

// choosePorts finds out at once, and all in one place, whether the addresses are free.
func (d *dev) choosePorts() error {
	for _, a := range []struct {
		what, flag string
		addr       *string
	}{
		{"the gateway", "-http", &d.cfg.HTTP.Addr},
		{"the demo page", "-page", &d.o.page},
		{"the admin port", "-admin", &d.cfg.Admin.Addr},
		{"the gateway's gRPC server", "-grpc", &d.cfg.GRPC.Addr},
		{"im-logic", "-logic", &d.o.logic},
	} {
		addr, err := choose(a.what, *a.addr, a.flag)
		if err != nil {
			return err
		}
		*a.addr = addr
	}
	allowPage(&d.cfg, d.o.page)
	useLogic(&d.cfg, d.o.logic)
	if err := d.cfg.Validate(); err != nil {
		return err
	}
	return nil
}

func (d *dev) startServers(ctx context.Context) (*embedded.Servers, error) {
	k := &d.cfg.Kafka
	servers, err := embedded.Start(ctx, embedded.Options{
		KafkaPort: d.o.kafkaPort, EtcdPort: d.o.etcdPort, RedisPort: d.o.redisPort, Dir: d.o.data,
		Topics: []string{k.UpstreamTopic, k.UndeliveredTopic, k.DeadletterTopic, k.UserEventsTopic},
	})
	var taken *embedded.PortError
	if errors.As(err, &taken) {
		flags := map[string]string{
			embedded.Kafka: "-kafka-port", embedded.Etcd: "-etcd-port", embedded.Redis: "-redis-port",
		}
		return nil, &portError{taken.Server, taken.Addr, flags[taken.Server], taken.Err}
	}
	return servers, err
}

// running is a part that runs in the background.
type running struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when it has ended
	err    error         // written before done is closed
}

func (r *running) stop() error {
	r.cancel()
	<-r.done
	return r.err
}

// startLogic returns once im-logic is found in etcd.
func (d *dev) startLogic(ctx context.Context) (*running, error) {
	o, err := logicOptions(&d.cfg, d.o.logic, d.logger.With().Str("part", "im-logic").Logger())
	if err != nil {
		return nil, err
	}
	service, err := logic.New(o)
	if err != nil {
		return nil, err
	}
	if d.o.demo {
		for _, u := range demoUsers {
			if err := service.AddUser(ctx, u.name, u.password); err != nil {
				return nil, err
			}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &running{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = service.Run(ctx)
	}()
	select {
	case <-service.Ready():
		return r, nil
	case <-r.done:
		return nil, errors.Join(errors.New("im-logic ended while it started"), r.stop())
	case s := <-d.signals:
		return nil, errors.Join(fmt.Errorf("%v while im-logic waited for etcd", s), r.stop())
	}
}

// startPage serves the demo page in the background.
func (d *dev) startPage() (stop func(), err error) {
	handler, err := page.New(page.Options{Gateways: []string{"http://" + d.cfg.HTTP.Addr}})
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", d.o.page)
	if err != nil {
		return nil, fmt.Errorf("the demo page cannot listen: %w", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), pageStop)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			err = server.Close() // a browser that does not let go
			d.logger.Debug().Err(err).Msg("the page's connections were cut")
		}
		<-served
	}, nil
}

// runGateway runs the gateway until a signal, or until a part ends by itself. The first signal
// drains it, the second stops it at once.
func (d *dev) runGateway(logicEnded <-chan struct{}) error {
	gw, err := d.start(d.cfg, d.logger)
	if err != nil {
		return fmt.Errorf("the gateway does not start: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- gw.Run(ctx) }()

	ready := gw.Ready()
	var cause error
	for waiting := true; waiting; {
		select {
		case <-ready:
			ready = nil
			if err := hello(d.stdout, &d.cfg, gw.GatewayID(), d.o); err != nil {
				d.logger.Warn().Err(err).Msg("nobody was told what to do next")
			}
		case err := <-done:
			if err == nil {
				err = errors.New("nobody asked for it")
			}
			return fmt.Errorf("the gateway ended: %w", err)
		case <-logicEnded:
			cause = errors.New("im-logic ended by itself") // its own error is added when it is stopped
			d.logger.Error().Err(cause).Msg("stopping")
			waiting = false
		case s := <-d.signals:
			waiting = false
			d.logger.Info().Stringer("signal", s).Msg("stopping; a second signal stops at once")
		}
	}
	stop()
	select {
	case err := <-done:
		if errors.Is(err, context.Canceled) {
			err = nil
		}
		return errors.Join(cause, err)
	case <-d.signals:
		gw.Abort()
	}
	late := time.NewTimer(abortWait)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
	}
	return errAborted
}
