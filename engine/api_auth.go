package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"im-gateway/codec/logicpb"
)

const refreshPath = "/api/auth/refresh"

// authRoutes lists the routes that im-logic's AuthService answers. Every field of the requests is
// a string and required. Those by which somebody gets in are limited in number.
func authRoutes(s logicpb.AuthServiceClient, methods []string) []*route {
	return []*route{
		authRoute("/api/auth/register", methods, s.Register, true),
		authRoute("/api/auth/login", methods, s.Login, true),
		authRoute("/api/auth/guest", methods, s.GuestLogin, true),
		authRoute(refreshPath, methods, s.RefreshToken, false),
		authRoute("/api/auth/logout", methods, s.Logout, false),
	}
}

func authRoute[M any, Request interface {
	*M
	proto.Message
}, Answer proto.Message](path string, methods []string,
	method func(context.Context, Request, ...grpc.CallOption) (Answer, error), limited bool) *route {
	return &route{path: path, methods: methods, serve: func(c *call) {
		if limited && !c.admitAddress() {
			return
		}
		body, ok := c.body(c.rules.MaxBodyBytes, "BODY_TOO_LARGE")
		if !ok {
			return
		}
		request := Request(new(M))
		if problem := decode(body, request); problem != nil {
			c.fail(problem.status, problem.code, problem.message)
			return
		}
		if limited && !c.admitName(request) {
			return
		}
		ctx, cancel := context.WithTimeout(c.r.Context(), c.rules.AuthDeadline)
		defer cancel()
		answer, err := method(metadata.AppendToOutgoingContext(ctx, "x-request-id", c.id), request)
		if err != nil {
			c.failStatus(err)
			return
		}
		if !complete(path, answer) {
			c.note = errIncomplete
			c.fail(http.StatusBadGateway, "BAD_GATEWAY", "im-logic gave an incomplete answer")
			return
		}
		data, err := encode(answer)
		if err != nil {
			c.note = err
			c.fail(http.StatusInternalServerError, "INTERNAL", "internal error")
			return
		}
		c.succeed(data)
	}}
}

var errIncomplete = errors.New("im-logic's answer lacks a token or a user")

// complete tells whether an answer has what its caller cannot do without. Who refreshes knows the user.
func complete(path string, answer proto.Message) bool {
	switch a := answer.(type) {
	case *logicpb.TokenResponse:
		return a.GetToken() != "" && (path == refreshPath || a.GetUser().GetUserId() != "")
	case *logicpb.RegisterResponse:
		return a.GetUser().GetUserId() != ""
	}
	return true
}

// refusal is why a body was not taken.
type refusal struct {
	status  int
	code    string
	message string
}

// decode reads a JSON object into a message whose fields are all required strings.
func decode(body []byte, into proto.Message) *refusal {
	var given map[string]json.RawMessage
	if err := json.Unmarshal(body, &given); err != nil || given == nil {
		return &refusal{http.StatusBadRequest, "INVALID_JSON", "the body must be one JSON object"}
	}
	var missing []string
	fields := into.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		v, ok := given[f.JSONName()]
		if snake, also := given[f.TextName()]; also && f.TextName() != f.JSONName() {
			if ok {
				return &refusal{http.StatusBadRequest, "INVALID_ARGUMENT", f.JSONName() + " is given twice"}
			}
			v = snake
		}
		switch {
		case len(v) == 0 || string(v) == "null" || string(v) == `""`:
			missing = append(missing, f.JSONName())
		case v[0] != '"':
			return &refusal{http.StatusBadRequest, "INVALID_ARGUMENT", f.JSONName() + " must be a string"}
		}
	}
	if len(missing) > 0 {
		return &refusal{http.StatusUnprocessableEntity, "MISSING_FIELD", "missing: " + strings.Join(missing, ", ")}
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(body, into); err != nil {
		// Not the error itself: it may quote the password.
		return &refusal{http.StatusBadRequest, "INVALID_JSON", "the body is not valid UTF-8 or repeats a field"}
	}
	return nil
}

// encode is protojson with every field present, and with 64-bit numbers as numbers: those that
// stand in these messages are milliseconds, which every client's numbers hold.
func encode(m proto.Message) (json.RawMessage, error) {
	text, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return numbers(text, m.ProtoReflect().Descriptor())
}

func numbers(text json.RawMessage, d protoreflect.MessageDescriptor) (json.RawMessage, error) {
	var values map[string]json.RawMessage
	if err := json.Unmarshal(text, &values); err != nil || values == nil {
		return text, err // null: a message that is not there
	}
	fields := d.Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		v := values[f.JSONName()]
		if f.Cardinality() == protoreflect.Repeated {
			continue
		}
		switch f.Kind() {
		case protoreflect.Int64Kind, protoreflect.Uint64Kind:
			values[f.JSONName()] = bytes.Trim(v, `"`)
		case protoreflect.MessageKind:
			inner, err := numbers(v, f.Message())
			if err != nil {
				return nil, err
			}
			values[f.JSONName()] = inner
		}
	}
	return json.Marshal(values)
}
