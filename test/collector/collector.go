// Package collector receives OpenTelemetry spans by OTLP over gRPC, for tests.
package collector

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
)

// Span is one that was received. Ids are in hex; those that are not there are empty.
type Span struct {
	Name, Kind              string // Kind as server, client, producer, consumer, internal
	TraceID, SpanID, Parent string
	Status, Problem         string            // Status as unset, ok, error
	Attributes              map[string]string // numbers and truths as Go prints them
	Resource                map[string]string // attributes of who made the span
	Begun, Ended            time.Time
}

// Collector keeps what it receives. All methods may be called from any goroutine.
type Collector struct {
	collectorpb.UnimplementedTraceServiceServer
	Addr   string
	server *grpc.Server
	served chan error

	mu     sync.Mutex
	answer func(context.Context) error // nil: everything is taken
	spans  []Span
	known  map[string]bool // span ids: an attempt may be repeated
}

// Start listens on addr; port 0: a free one.
func Start(addr string, opts ...grpc.ServerOption) (*Collector, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("collector: %w", err)
	}
	c := &Collector{Addr: ln.Addr().String(), server: grpc.NewServer(opts...), served: make(chan error, 1), known: map[string]bool{}}
	collectorpb.RegisterTraceServiceServer(c.server, c)
	go func() { c.served <- c.server.Serve(ln) }()
	return c, nil
}

// Stop ends it, with all connections.
func (c *Collector) Stop() {
	c.server.Stop()
	<-c.served
}

// Answer makes f decide about what comes from now on: its error is the answer. nil: all is taken.
func (c *Collector) Answer(f func(context.Context) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = f
}

// Spans returns what was received of a trace, in the order of its coming; without an id everything.
func (c *Collector) Spans(traceID string) (list []Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if traceID == "" || s.TraceID == traceID {
			list = append(list, s)
		}
	}
	return list
}

// Export implements the OTLP trace service.
func (c *Collector) Export(ctx context.Context, r *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	answer := c.answer
	c.mu.Unlock()
	if answer != nil {
		if err := answer(ctx); err != nil {
			return nil, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range r.GetResourceSpans() {
		of := attributes(rs.GetResource().GetAttributes())
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				if id := string(s.GetTraceId()) + string(s.GetSpanId()); !c.known[id] {
					c.known[id] = true
					c.spans = append(c.spans, read(s, of))
				}
			}
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func read(s *tracepb.Span, of map[string]string) Span {
	return Span{
		Name: s.GetName(), Kind: word(s.GetKind().String(), "SPAN_KIND_"),
		TraceID: hex.EncodeToString(s.GetTraceId()), SpanID: hex.EncodeToString(s.GetSpanId()), Parent: hex.EncodeToString(s.GetParentSpanId()),
		Status: word(s.GetStatus().GetCode().String(), "STATUS_CODE_"), Problem: s.GetStatus().GetMessage(),
		Attributes: attributes(s.GetAttributes()), Resource: of,
		Begun: time.Unix(0, int64(s.GetStartTimeUnixNano())), Ended: time.Unix(0, int64(s.GetEndTimeUnixNano())),
	}
}

func word(name, prefix string) string { return strings.ToLower(strings.TrimPrefix(name, prefix)) }

func attributes(list []*commonpb.KeyValue) map[string]string {
	m := map[string]string{}
	for _, a := range list {
		switch v := a.GetValue().GetValue().(type) {
		case *commonpb.AnyValue_StringValue:
			m[a.GetKey()] = v.StringValue
		case *commonpb.AnyValue_IntValue:
			m[a.GetKey()] = fmt.Sprint(v.IntValue)
		case *commonpb.AnyValue_BoolValue:
			m[a.GetKey()] = fmt.Sprint(v.BoolValue)
		default:
			m[a.GetKey()] = a.GetValue().String()
		}
	}
	return m
}
