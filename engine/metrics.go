package engine

import (
	"context"
	"crypto/tls"
	"fmt"
	"regexp"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// runtimeMetrics are those of Go's runtime that tell why a gateway is slow, beside the collector's own: how
// long goroutines wait for a processor, and how long collections stop them all.
var runtimeMetrics = regexp.MustCompile(`^/sched/(latencies|pauses/total/gc):seconds$`)

// runtimeRegistry returns the registry of the metrics of the process and of Go. It is apart because reading it
// costs more than the gateway's own: before Linux 6.2 a look at all descriptors.
func runtimeRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectors.GoRuntimeMetricsRule{Matcher: runtimeMetrics})),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector())
	return r
}

// registerGauge registers a gauge that is read when it is asked for.
func registerGauge(r prometheus.Registerer, name, help string, f func() int) error {
	g := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "im_gateway_" + name, Help: help}, func() float64 { return float64(f()) })
	if err := r.Register(g); err != nil {
		return fmt.Errorf("register im_gateway_%s: %w", name, err)
	}
	return nil
}

func oneIf(b bool) int {
	if b {
		return 1
	}
	return 0
}

// registerCertificate shows when the certificate of one of the ports expires; it may be replaced meanwhile.
func registerCertificate(r prometheus.Registerer, port string, current func(*tls.ClientHelloInfo) (*tls.Certificate, error)) error {
	g := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "im_gateway_tls_certificate_expiry_timestamp_seconds",
		Help:        "When the certificate in use by a port expires, Unix time; only for ports with TLS.",
		ConstLabels: prometheus.Labels{"port": port},
	}, func() float64 {
		c, err := current(nil)
		if err != nil || c.Leaf == nil {
			return 0
		}
		return float64(c.Leaf.NotAfter.Unix())
	})
	if err := r.Register(g); err != nil {
		return fmt.Errorf("register the metrics of the %s port's certificate: %w", port, err)
	}
	return nil
}

// rpcs counts and times gRPC calls, those served or those made. Methods are those of registered services
// and codes those of gRPC, so the labels are bounded.
type rpcs struct {
	calls   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

// newRPCs registers im_gateway_NAME_calls_total and im_gateway_NAME_call_duration_seconds; what says in
// their help which calls they are of.
func newRPCs(name, what string, r prometheus.Registerer) (*rpcs, error) {
	m := &rpcs{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "im_gateway_" + name + "_calls_total", Help: "Calls " + what + ", by method and status.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "im_gateway_" + name + "_call_duration_seconds", Help: "Time of a call " + what + ", by method.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
		}, []string{"method"}),
	}
	for _, c := range []prometheus.Collector{m.calls, m.seconds} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register the metrics of calls %s: %w", what, err)
		}
	}
	return m, nil
}

func (m *rpcs) ended(method string, began time.Time, err error) {
	m.calls.WithLabelValues(method, status.Code(err).String()).Inc()
	if !began.IsZero() {
		m.seconds.WithLabelValues(method).Observe(time.Since(began).Seconds())
	}
}

// client is a grpc.UnaryClientInterceptor.
func (m *rpcs) client(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	began := time.Now()
	err := invoke(ctx, method, request, reply, conn, opts...)
	m.ended(method, began, err)
	return err
}
