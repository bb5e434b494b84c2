// Package tracing sends spans of what the gateway does to an OpenTelemetry collector, by OTLP over gRPC.
// It alone knows OpenTelemetry. The other parts decide with a codec.Sampler whether something is traced,
// carry a codec.Span while it is under way, and hand it over when it has ended: into one bounded queue,
// which never makes them wait. Everything else happens on the goroutine of Run.
package tracing

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"im-gateway/codec"
)

const (
	// queueSpans is the room between those who trace and Run. When it is full spans are dropped.
	queueSpans = 4096
	// A batch is sent when it has so many spans, or after flushInterval.
	batchSpans    = 512
	flushInterval = time.Second
	// exportTimeout bounds the sending of one batch, attempts included; what failed is not kept.
	exportTimeout = 10 * time.Second
	retryFirst    = 200 * time.Millisecond
	retryMax      = 2 * time.Second
	redialMax     = 10 * time.Second
	// stopTimeout bounds what is still sent once Run is to end.
	stopTimeout = 2 * time.Second
	// troublePause is how often at most a failure is logged.
	troublePause = 30 * time.Second
)

// Options configure a Tracer. All fields are required but TLS.
type Options struct {
	Endpoint    string      // of the collector, host:port
	TLS         *tls.Config // nil: no TLS
	ServiceName string
	Version     string
	GatewayID   string
	Sampler     *codec.Sampler
	// UpstreamTopic and DownstreamPrefix name the spans of messages.
	UpstreamTopic    string
	DownstreamPrefix string
	Scheme           string // of the public port, http or https
	Logger           zerolog.Logger
	Registerer       prometheus.Registerer
}

// Tracer takes ended spans and sends them. The methods but Run may be called from any goroutine, and never
// block. On nil, which is a Tracer that traces nothing, Begin may be called, and the interceptors.
type Tracer struct {
	o        Options
	queue    chan *ended // never closed
	conn     *grpc.ClientConn
	exporter *otlptrace.Exporter
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	trouble  zerolog.Logger // sampled
	late     time.Duration  // stopTimeout, but in tests

	exported, dropped, failed atomic.Int64

	// Owned by Run.
	ids   ids
	batch batch
}

// ended is a span that has ended, and how to describe it, which Run does.
type ended struct {
	*codec.Span
	at       time.Time
	describe func(*description)
}

// New checks the options; Run starts. Nothing is dialled before there is something to send.
func New(o Options) (*Tracer, error) {
	if o.Sampler == nil || o.Endpoint == "" || o.ServiceName == "" {
		return nil, errors.New("tracing: an option is missing")
	}
	t := &Tracer{
		o: o, queue: make(chan *ended, queueSpans), late: stopTimeout,
		trouble: o.Logger.Sample(&zerolog.BurstSampler{Burst: 1, Period: troublePause}),
	}
	secure := insecure.NewCredentials()
	if o.TLS != nil {
		secure = credentials.NewTLS(o.TLS)
	}
	var err error
	again := backoff.DefaultConfig
	again.BaseDelay, again.MaxDelay = retryFirst, redialMax
	t.conn, err = grpc.NewClient("dns:///"+o.Endpoint, grpc.WithTransportCredentials(secure), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: again, MinConnectTimeout: exportTimeout}))
	if err != nil {
		return nil, fmt.Errorf("client of the collector at %s: %w", o.Endpoint, err)
	}
	t.exporter = otlptracegrpc.NewUnstarted(otlptracegrpc.WithGRPCConn(t.conn), otlptracegrpc.WithTimeout(exportTimeout),
		otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{
			Enabled: true, InitialInterval: retryFirst, MaxInterval: retryMax, MaxElapsedTime: exportTimeout,
		}))
	of, err := resource.New(context.Background(), resource.WithTelemetrySDK(), resource.WithAttributes(
		semconv.ServiceName(o.ServiceName), semconv.ServiceVersion(o.Version), semconv.ServiceInstanceID(o.GatewayID)))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("describe the source of spans: %w", err), t.conn.Close())
	}
	// What comes here has been sampled, and has its ids.
	t.provider = sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.AlwaysSample()), sdktrace.WithIDGenerator(&t.ids),
		sdktrace.WithSpanProcessor(&t.batch), sdktrace.WithResource(of))
	t.tracer = t.provider.Tracer("im-gateway", trace.WithInstrumentationVersion(o.Version), trace.WithSchemaURL(semconv.SchemaURL))
	if err := o.Registerer.Register(t); err != nil {
		return nil, errors.Join(fmt.Errorf("register the metrics of tracing: %w", err), t.conn.Close())
	}
	return t, nil
}

// Begin begins a span that goes on from in, where it is traced; nil: it is not. told is what those are told
// who are called because of it: with a Tracer they always know what was decided.
func (t *Tracer) Begin(in codec.TraceContext) (told codec.TraceContext, span *codec.Span) {
	if t == nil {
		return in, nil
	}
	if span = t.o.Sampler.Continue(in, time.Now()); span != nil {
		return span.TraceContext, span
	}
	if in.TraceID == [16]byte{} {
		in = codec.NewTraceContext()
	}
	return in, nil
}

// end hands over a span that ends now. describe must not refer to what may change.
func (t *Tracer) end(s *codec.Span, describe func(*description)) {
	select {
	case t.queue <- &ended{s, time.Now(), describe}:
	default:
		t.dropped.Add(1)
	}
}

// Run sends what is handed over until ctx ends, and what was handed over by then.
func (t *Tracer) Run(ctx context.Context) error {
	defer t.conn.Close()
	if err := t.exporter.Start(ctx); err != nil {
		return fmt.Errorf("start the exporter of spans: %w", err)
	}
	// What is on its way when ctx ends may still arrive.
	sending, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	defer context.AfterFunc(ctx, func() {
		late := time.NewTimer(t.late)
		defer late.Stop()
		select {
		case <-late.C:
			cut()
		case <-sending.Done():
		}
	})()
	flush := time.NewTicker(flushInterval)
	defer flush.Stop()
	for {
		select {
		case e := <-t.queue:
			if t.add(e); len(t.batch.spans) >= batchSpans {
				t.export(sending)
			}
		case <-flush.C:
			t.export(sending)
		case <-ctx.Done():
			t.finish(sending)
			return nil
		}
	}
}

// finish sends what is left, until ctx ends.
func (t *Tracer) finish(ctx context.Context) {
	for {
		select {
		case e := <-t.queue:
			if t.add(e); len(t.batch.spans) < batchSpans {
				continue
			}
			t.export(ctx)
		default:
			t.export(ctx)
			if err := t.exporter.Shutdown(ctx); err != nil {
				t.o.Logger.Debug().Err(err).Msg("the exporter of spans was not stopped in order")
			}
			return
		}
	}
}

// add makes an OpenTelemetry span of one that has ended, which the batch gets.
func (t *Tracer) add(e *ended) {
	var d description
	e.describe(&d)
	t.ids.next = e.Span
	ctx := trace.ContextWithRemoteSpanContext(context.Background(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: e.TraceID, SpanID: e.Parent, TraceFlags: trace.FlagsSampled, Remote: true,
	}))
	_, span := t.tracer.Start(ctx, d.name, trace.WithSpanKind(d.kind), trace.WithTimestamp(e.Begun), trace.WithAttributes(d.attributes...))
	span.SetStatus(d.status, d.problem)
	span.End(trace.WithTimestamp(e.at))
}

func (t *Tracer) export(ctx context.Context) {
	spans := t.batch.spans
	if len(spans) == 0 {
		return
	}
	err := t.exporter.ExportSpans(ctx, spans)
	clear(spans)
	t.batch.spans = spans[:0]
	if err != nil {
		t.failed.Add(int64(len(spans)))
		t.trouble.Warn().Err(err).Int("spans", len(spans)).Str("endpoint", t.o.Endpoint).
			Msg("spans could not be sent to the collector and are lost")
		return
	}
	t.exported.Add(int64(len(spans)))
}

// ids gives the SDK the ids that a span has already.
type ids struct{ next *codec.Span }

var _ sdktrace.IDGenerator = (*ids)(nil)

// NewIDs implements sdktrace.IDGenerator; it is called for spans without a trace id, of which there are none.
func (i *ids) NewIDs(context.Context) (trace.TraceID, trace.SpanID) {
	return i.next.TraceID, i.next.SpanID
}

// NewSpanID implements sdktrace.IDGenerator.
func (i *ids) NewSpanID(context.Context, trace.TraceID) trace.SpanID { return i.next.SpanID }

// batch gathers the spans that the SDK has ended, on the goroutine that ends them.
type batch struct{ spans []sdktrace.ReadOnlySpan }

var _ sdktrace.SpanProcessor = (*batch)(nil)

// OnStart implements sdktrace.SpanProcessor.
func (b *batch) OnStart(context.Context, sdktrace.ReadWriteSpan) {}

// OnEnd implements sdktrace.SpanProcessor.
func (b *batch) OnEnd(s sdktrace.ReadOnlySpan) { b.spans = append(b.spans, s) }

// Shutdown implements sdktrace.SpanProcessor.
func (b *batch) Shutdown(context.Context) error { return nil }

// ForceFlush implements sdktrace.SpanProcessor.
func (b *batch) ForceFlush(context.Context) error { return nil }

var (
	spansTotal = prometheus.NewDesc("im_gateway_tracing_spans_total",
		"Spans by what became of them: exported, limited (not begun, as there were too many in that second), dropped "+
			"(the queue was full), failed (the collector did not take them).", []string{"outcome"}, nil)
	queueDepth = prometheus.NewDesc("im_gateway_tracing_queue_spans", "Spans that wait to be sent.", nil, nil)
	queueBound = prometheus.NewDesc("im_gateway_tracing_queue_spans_bound",
		"The bound of that queue; beyond it spans are dropped.", nil, nil)
)

// Describe implements prometheus.Collector.
func (t *Tracer) Describe(ch chan<- *prometheus.Desc) {
	ch <- spansTotal
	ch <- queueDepth
	ch <- queueBound
}

// Collect implements prometheus.Collector.
func (t *Tracer) Collect(ch chan<- prometheus.Metric) {
	for outcome, n := range map[string]int64{
		"exported": t.exported.Load(), "limited": t.o.Sampler.Limited(), "dropped": t.dropped.Load(), "failed": t.failed.Load(),
	} {
		ch <- prometheus.MustNewConstMetric(spansTotal, prometheus.CounterValue, float64(n), outcome)
	}
	ch <- prometheus.MustNewConstMetric(queueDepth, prometheus.GaugeValue, float64(len(t.queue)))
	ch <- prometheus.MustNewConstMetric(queueBound, prometheus.GaugeValue, float64(cap(t.queue)))
}
