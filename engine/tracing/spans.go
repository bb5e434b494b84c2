package tracing

import (
	"net/http"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"im-gateway/codec"
)

// description is what a span says besides its ids and times, by the semantic conventions. No user id, no
// token and nothing that a client has written is ever in it: a message is named by the gateway's or
// im-logic's message_id.
type description struct {
	name       string
	kind       trace.SpanKind
	attributes []attribute.KeyValue
	status     codes.Code
	problem    string // with codes.Error
}

func (d *description) add(list ...attribute.KeyValue) { d.attributes = append(d.attributes, list...) }

func (d *description) fail(kind, problem string) {
	d.status, d.problem = codes.Error, problem
	d.add(semconv.ErrorTypeKey.String(kind))
}

// Upstream ends the span of a client message: from its arrival until Kafka's answer is on its way to the
// client, or its refusal is.
func (t *Tracer) Upstream(u *codec.Upstream) {
	id, result := string(u.MessageID), u.Result
	t.end(u.Span, func(d *description) {
		d.name, d.kind = "send "+t.o.UpstreamTopic, trace.SpanKindProducer
		d.add(semconv.MessagingSystemKafka, semconv.MessagingOperationName("send"), semconv.MessagingOperationTypeSend,
			semconv.MessagingDestinationName(t.o.UpstreamTopic), semconv.MessagingMessageID(id))
		if result.Code != codec.OK {
			d.fail(string(result.Code), string(result.Code))
			return
		}
		d.add(semconv.MessagingDestinationPartitionID(strconv.Itoa(int(result.Partition))))
		if result.Offset >= 0 {
			d.add(semconv.MessagingKafkaOffset(int(result.Offset)))
		}
	})
}

// Downstream ends the span of a downstream record. r becomes the Tracer's.
func (t *Tracer) Downstream(r *codec.RecordTrace) {
	t.end(r.Span, func(d *description) {
		template := t.o.DownstreamPrefix + "{gateway_id}"
		d.name, d.kind = "process "+template, trace.SpanKindConsumer
		d.add(semconv.MessagingSystemKafka, semconv.MessagingOperationName("process"), semconv.MessagingOperationTypeProcess,
			semconv.MessagingDestinationName(r.Topic), semconv.MessagingDestinationTemplate(template),
			semconv.MessagingConsumerGroupName(r.Group), semconv.MessagingKafkaOffset(int(r.Offset)),
			semconv.MessagingDestinationPartitionID(strconv.Itoa(int(r.Partition))))
		if r.MessageID != "" {
			d.add(semconv.MessagingMessageID(r.MessageID))
		}
		for end, n := range r.Ends {
			if n > 0 {
				d.add(attribute.Int("im_gateway.deliveries."+codec.End(end).String(), n))
			}
		}
		switch {
		case r.DeadLetter != nil:
			d.fail("dead_letter", r.DeadLetter.Error())
		case r.Abandoned:
			d.fail("abandoned", "the partition was lost; its next reader reads the record again")
		}
	})
}

// HTTP ends the span of a request to the HTTP API; route is its path, too.
func (t *Tracer) HTTP(s *codec.Span, method, route string, status int) {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
	default:
		method = "_OTHER" // it may be any word
	}
	t.end(s, func(d *description) {
		d.name, d.kind = method+" "+route, trace.SpanKindServer
		d.add(semconv.HTTPRequestMethodKey.String(method), semconv.HTTPRoute(route), semconv.URLPath(route),
			semconv.URLScheme(t.o.Scheme), semconv.HTTPResponseStatusCode(status))
		if status >= 500 {
			d.fail(strconv.Itoa(status), "")
		}
	})
}
