package tracing

import (
	"context"
	"strings"

	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	rpc "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"im-gateway/codec"
)

// header is the metadata, and the HTTP header, that carries a context.
const header = "traceparent"

type contextKey struct{}

// NewContext returns a context with what those are told who are called because of it.
func NewContext(ctx context.Context, c codec.TraceContext) context.Context {
	return context.WithValue(ctx, contextKey{}, c)
}

// FromContext returns what NewContext was given; ok is false without.
func FromContext(ctx context.Context) (c codec.TraceContext, ok bool) {
	c, ok = ctx.Value(contextKey{}).(codec.TraceContext)
	return c, ok
}

// Client is an interceptor that tells the callee the context of the call's trace; where that is traced
// here the call has a span of its own.
func (t *Tracer) Client(ctx context.Context, method string, request, answer any, conn *grpc.ClientConn,
	call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	in, ok := FromContext(ctx)
	if !ok {
		return call(ctx, method, request, answer, conn, opts...)
	}
	told, span := t.Begin(in)
	err := call(metadata.AppendToOutgoingContext(ctx, header, string(told.AppendTraceParent(nil))), method, request, answer, conn, opts...)
	if span != nil {
		t.call(span, trace.SpanKindClient, method, status.Code(err))
	}
	return err
}

// Server is an interceptor that makes spans of calls to this gateway, but for the questions after its health.
func (t *Tracer) Server(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if strings.HasPrefix(info.FullMethod, "/grpc.health.") {
		return handler(ctx, request)
	}
	var in codec.TraceContext
	if v := metadata.ValueFromIncomingContext(ctx, header); len(v) == 1 {
		in, _ = codec.ParseTraceParent(v[0])
	}
	_, span := t.Begin(in)
	answer, err := handler(ctx, request)
	if span != nil {
		t.call(span, trace.SpanKindServer, info.FullMethod, status.Code(err))
	}
	return answer, err
}

// call ends the span of a call.
func (t *Tracer) call(s *codec.Span, kind trace.SpanKind, method string, code codes.Code) {
	t.end(s, func(d *description) {
		result := rpc.Code(code).String()
		d.name, d.kind = strings.TrimPrefix(method, "/"), kind
		d.add(semconv.RPCSystemNameGRPC, semconv.RPCMethod(d.name), semconv.RPCResponseStatusCode(result))
		if code != codes.OK && (kind == trace.SpanKindClient || faults[code]) {
			d.fail(result, "")
		}
	})
}

// faults are the codes by which a server says that it has failed, rather than its caller.
var faults = map[codes.Code]bool{
	codes.Unknown: true, codes.DeadlineExceeded: true, codes.Unimplemented: true, codes.Internal: true,
	codes.Unavailable: true, codes.DataLoss: true,
}
