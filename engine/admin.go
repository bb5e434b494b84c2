package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	"im-gateway/codec/gatewaypb"
	"im-gateway/engine/adminpage"
)

// AdminOptions configure the operators' port.
type AdminOptions struct {
	GatewayID string
	Version   string
	Readiness *Readiness
	Registry  *prometheus.Registry
	Operator  gatewaypb.AdminServiceServer // what the page shows and does
	Token     *actingToken                 // that acting asks for
	Logger    zerolog.Logger
}

// NewAdmin returns the handler of the operators' port: the page at /, /healthz, /readyz, /metrics, /ledger,
// /debug/pprof, and to act POST /drain, /kick and /log-level.
// It registers the metrics that say which gateway this is and whether it is ready.
func NewAdmin(o AdminOptions) (http.Handler, error) {
	info := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "im_gateway_info",
		Help:        "Always 1; the labels name the gateway and its version.",
		ConstLabels: prometheus.Labels{"gateway_id": o.GatewayID, "version": o.Version},
	}, func() float64 { return 1 })
	if err := errors.Join(
		o.Registry.Register(info),
		registerGauge(o.Registry, "ready", "Whether /readyz answers 200: 1 or 0.",
			func() int { return oneIf(len(o.Readiness.Missing()) == 0) }),
		registerGauge(o.Registry, "draining", "Whether the gateway drains or stops: 1 or 0.",
			func() int { return oneIf(o.Readiness.Draining()) }),
	); err != nil {
		return nil, fmt.Errorf("register the gateway's own metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeAdmin(w, http.StatusOK, map[string]any{"status": "ok"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if missing := o.Readiness.Missing(); len(missing) > 0 {
			writeAdmin(w, http.StatusServiceUnavailable, map[string]any{"ready": false, "missing": missing})
			return
		}
		writeAdmin(w, http.StatusOK, map[string]any{"ready": true})
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(prometheus.Gatherers{o.Registry, runtimeRegistry()}, promhttp.HandlerOpts{
		ErrorLog: promLog{o.Logger}, ErrorHandling: promhttp.ContinueOnError,
	}))
	mux.HandleFunc("GET /ledger", func(w http.ResponseWriter, _ *http.Request) {
		l, err := ReadLedger(o.Registry)
		if err != nil {
			writeAdmin(w, http.StatusInternalServerError, map[string]any{"error": err.Error()})
			return
		}
		writeAdmin(w, http.StatusOK, l)
	})
	page, err := adminpage.New(o.Operator, o.Logger)
	if err != nil {
		return nil, err
	}
	mux.Handle("GET /{$}", page)
	mux.Handle("GET /page/", page)
	o.actions(mux)
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux, nil
}

func writeAdmin(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a reader that went away is no concern of ours
}

// promLog writes what promhttp could not gather to the log.
type promLog struct{ logger zerolog.Logger }

// Println implements promhttp.Logger.
func (l promLog) Println(v ...any) { l.logger.Warn().Msg(fmt.Sprint(v...)) }

// adminLog carries net/http's complaints, mostly about clients, to our log.
type adminLog struct{ logger zerolog.Logger }

// Write implements io.Writer.
func (l adminLog) Write(p []byte) (int, error) {
	level := zerolog.DebugLevel
	if bytes.HasPrefix(p, []byte("http: panic")) {
		level = zerolog.ErrorLevel
	}
	l.logger.WithLevel(level).Str("detail", string(bytes.TrimSpace(p))).Msg("admin port")
	return len(p), nil
}

const adminStop = time.Second

// loopbackOnly answers requests that name a loopback host. A page of the web could have its own name point to
// this machine once it is loaded, and have the browser of who works here read the port for it (DNS rebinding).
func loopbackOnly(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		host = strings.Trim(host, "[]")
		if ip := net.ParseIP(host); !strings.EqualFold(host, "localhost") && (ip == nil || !ip.IsLoopback()) {
			writeAdmin(w, http.StatusMisdirectedRequest, map[string]any{"error": "this port is for this machine: address it as localhost or 127.0.0.1"})
			return
		}
		h.ServeHTTP(w, r)
	})
}

// ServeAdmin serves the operators' port on ln, which it closes, until ctx ends. It is the last to
// stop, so that a drain can be watched.
func ServeAdmin(ctx context.Context, ln net.Listener, h http.Handler, logger zerolog.Logger) error {
	if a, ok := ln.Addr().(*net.TCPAddr); ok && a.IP.IsLoopback() {
		h = loopbackOnly(h)
	}
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second, // a TLS handshake's time, too
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          log.New(adminLog{logger}, "", 0),
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve the admin port: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), adminStop)
	defer cancel()
	if server.Shutdown(stop) != nil {
		_ = server.Close() // a profile under way is cut off
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the admin port: %w", err)
	}
	return nil
}
