package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"im-gateway/codec/clientpb"
)

// documents are the files that a gateway serves, see engine/api_documents.go.
const documents = "../../engine"

// base is what the documents' addresses begin with in the tests.
const base = "test:/"

const downstreamPrefix = "im-downstream-topic-"

// specification is what the AsyncAPI document and its schemas say. Every frame and event that any test's client
// reads is held against it, and in the end every record of the suite.
type specification struct {
	messages map[string]map[string]*message // by channel and name
	client   *jsonschema.Schema             // any frame of a client's
	record   *jsonschema.Schema             // any downstream record
	query    *jsonschema.Schema
	answers  map[string]*jsonschema.Schema // of the HTTP API, by method, path and status
	closes   map[int]bool                  // the close codes

	mu       sync.Mutex
	seen     map[string]bool // channel/name, and channel/name field of what the gateways sent
	fields   map[string]bool // all there are of the latter
	exempted map[string]bool // downstream records that are taken though their schema excludes them
}

// message is one message of a channel. What a gateway sends is taken strictly: a field that its schema does
// not name is an error.
type message struct {
	headers, payload *jsonschema.Schema // nil: nothing is said of them
	constant         string             // the type that it always has
}

// loader reads schemas from the documents; a strict one closes what a gateway writes against further fields.
type loader struct{ strict bool }

// Load implements jsonschema.URLLoader.
func (l loader) Load(address string) (any, error) {
	text, err := os.ReadFile(filepath.Join(documents, strings.TrimPrefix(address, base)))
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if l.strict && byGateway(path.Base(address)) {
		closeObjects(doc)
	}
	return doc, err
}

func byGateway(name string) bool {
	return (strings.HasPrefix(name, "server-") || strings.HasPrefix(name, "kafka-")) && !strings.HasPrefix(name, "kafka-downstream")
}

func closeObjects(v any) {
	switch v := v.(type) {
	case map[string]any:
		if v["type"] == "object" {
			v["unevaluatedProperties"] = false
		}
		for _, inner := range v {
			closeObjects(inner)
		}
	case []any:
		for _, inner := range v {
			closeObjects(inner)
		}
	}
}

func loadSpecification() (*specification, error) {
	text, err := os.ReadFile(filepath.Join(documents, "asyncapi.json"))
	if err != nil {
		return nil, err
	}
	type part struct {
		Schema struct {
			Ref string `json:"$ref"`
		}
	}
	var doc struct {
		Channels map[string]struct {
			CloseCodes []struct{ Code int } `json:"x-close-codes"`
			Messages   map[string]struct {
				Ref              string `json:"$ref"` // to one of another channel
				Headers, Payload part
			}
		}
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		return nil, fmt.Errorf("asyncapi.json: %w", err)
	}
	s := &specification{messages: map[string]map[string]*message{}, seen: map[string]bool{}, fields: map[string]bool{}, exempted: map[string]bool{}, closes: map[int]bool{}}
	strict := jsonschema.NewCompiler()
	strict.UseLoader(loader{strict: true})
	compile := func(p part, where string) (*jsonschema.Schema, error) {
		if p.Schema.Ref == "" {
			return nil, nil
		}
		if name := path.Base(p.Schema.Ref); byGateway(name) {
			doc, err := loader{}.Load(base + p.Schema.Ref)
			if err != nil {
				return nil, err
			}
			listFields(doc, where, s.fields)
		}
		return strict.Compile(base + p.Schema.Ref)
	}
	for channel, c := range doc.Channels {
		for _, known := range c.CloseCodes {
			s.closes[known.Code] = true
		}
		s.messages[channel] = map[string]*message{}
		for name, m := range c.Messages {
			var compiled message
			where := channel + "/" + name
			compiled.payload, err = compile(m.Payload, where)
			if err != nil {
				return nil, err
			}
			if compiled.headers, err = compile(m.Headers, where+" header"); err != nil {
				return nil, err
			}
			if p := compiled.payload; p != nil {
				if typ := p.Properties["type"]; typ != nil && typ.Const != nil {
					compiled.constant, _ = (*typ.Const).(string)
				}
			}
			s.messages[channel][name] = &compiled
		}
	}
	for channel, c := range doc.Channels {
		for name, m := range c.Messages {
			if m.Ref != "" {
				other, there := strings.CutPrefix(m.Ref, "#/channels/")
				other, _, _ = strings.Cut(other, "/messages/")
				if s.messages[channel][name] = s.messages[other][path.Base(m.Ref)]; !there || s.messages[channel][name] == nil {
					return nil, fmt.Errorf("asyncapi.json: %s leads nowhere", m.Ref)
				}
			}
		}
	}
	for file, schema := range map[string]**jsonschema.Schema{
		"client": &s.client, "kafka-downstream": &s.record, "connect-query": &s.query,
	} {
		if *schema, err = strict.Compile(base + "schemas/" + file + ".json"); err != nil {
			return nil, err
		}
	}
	return s, s.loadAnswers(strict)
}

// loadAnswers reads the OpenAPI document.
func (s *specification) loadAnswers(compiler *jsonschema.Compiler) error {
	text, err := os.ReadFile(filepath.Join(documents, "openapi.json"))
	if err != nil {
		return err
	}
	type response struct {
		Ref     string `json:"$ref"`
		Content map[string]json.RawMessage
	}
	var doc struct {
		Paths      map[string]map[string]struct{ Responses map[string]response }
		Components struct{ Responses map[string]response }
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		return fmt.Errorf("openapi.json: %w", err)
	}
	escape := strings.NewReplacer("~", "~0", "/", "~1").Replace
	s.answers = map[string]*jsonschema.Schema{}
	for path, methods := range doc.Paths {
		for method, op := range methods {
			for status, r := range op.Responses {
				at := "#/paths/" + escape(path) + "/" + method + "/responses/" + status
				if r.Ref != "" {
					at = r.Ref
					r = doc.Components.Responses[strings.TrimPrefix(at, "#/components/responses/")]
				}
				if r.Content["application/json"] == nil {
					continue
				}
				schema, err := compiler.Compile(base + "openapi.json" + at + "/content/application~1json/schema")
				if err != nil {
					return err
				}
				s.answers[fmt.Sprint(strings.ToUpper(method), " ", path, " ", status)] = schema
			}
		}
	}
	return nil
}

// fromHTTP checks an answer of the HTTP API. What any path may answer stands in the document's words only.
func (s *specification) fromHTTP(method, path string, status int, body []byte) error {
	path, _, _ = strings.Cut(path, "?")
	at := fmt.Sprint(method, " ", path, " ", status)
	schema := s.answers[at]
	if schema == nil {
		if status == http.StatusMethodNotAllowed || status == http.StatusNotFound {
			return nil
		}
		return fmt.Errorf("%s is not described", at)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err == nil {
		err = schema.Validate(v)
	}
	if err != nil {
		return fmt.Errorf("%s: %.300s: %w", at, body, err)
	}
	return nil
}

// listFields adds the fields that a schema names.
func listFields(schema any, where string, fields map[string]bool) {
	o, _ := schema.(map[string]any)
	properties, _ := o["properties"].(map[string]any)
	for name, field := range properties {
		fields[where+" "+name] = true
		listFields(field, where+" "+name, fields)
	}
	branches, _ := o["oneOf"].([]any)
	for _, b := range branches {
		listFields(b, where, fields)
	}
}

// saw notes a message and its fields.
func (s *specification) saw(where string, parts ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[where] = true
	for i, p := range parts {
		prefix := where
		if i > 0 {
			prefix += " header"
		}
		s.sawFields(prefix, p)
	}
}

func (s *specification) sawFields(where string, v any) {
	o, _ := v.(map[string]any)
	for name, field := range o {
		if at := where + " " + name; s.fields[at] {
			s.seen[at] = true
			s.sawFields(at, field)
		}
	}
}

// fromServer checks a frame that a client has read on one of the channels json and events.
func (s *specification) fromServer(channel string, b []byte) error {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("frame %.300q: %w", b, err)
	}
	name := "record"
	o, _ := v.(map[string]any)
	for n, m := range s.messages["json"] {
		if m.constant != "" && m.constant == o["type"] {
			name = n
		}
	}
	m := s.messages[channel][name]
	if m == nil {
		return fmt.Errorf("frame %.300s: the channel %s has none of this type", b, channel)
	}
	if err := m.payload.Validate(v); err != nil {
		return fmt.Errorf("frame %.300s: %w", b, err)
	}
	s.saw(channel + "/" + name)
	s.saw("json/"+name, v)
	return nil
}

// closedWith checks a close code; -1: there was none.
func (s *specification) closedWith(code int) error {
	if code > 0 && !s.closes[code] {
		return fmt.Errorf("the close code %d is not described", code)
	}
	return nil
}

// streamClosed checks the data of the event close.
func (s *specification) streamClosed(b []byte) error {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err == nil {
		err = s.messages["events"]["close"].payload.Validate(v)
	}
	var d closedBy
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil {
		return fmt.Errorf("close event %.300s: %w", b, err)
	}
	s.saw("events/close", v)
	return s.closedWith(d.Code)
}

// fromServerProto checks a frame of im.proto.v1 as the JSON object that it stands for.
func (s *specification) fromServerProto(f *clientpb.ServerFrame) error {
	s.saw("protobuf/serverFrame")
	o := map[string]any{"type": f.GetType(), "data": json.RawMessage(f.GetData()), "timestamp": f.GetTimestamp()}
	if f.GetMessageId() != "" {
		o["message_id"] = f.GetMessageId()
	}
	if f.GetDeliveryId() != 0 {
		o["delivery_id"] = f.GetDeliveryId()
	}
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("frame %v: %w", f, err)
	}
	return s.fromServer("json", b)
}

// fromClient notes a frame that a client sends, if the schemas take it.
func (s *specification) fromClient(b []byte) {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return
	}
	for name, m := range s.messages["json"] {
		if m.payload.Validate(v) == nil {
			s.saw("json/" + name)
		}
	}
}

// exempt notes a downstream record that a gateway takes though its schema excludes it.
func (s *specification) exempt(record string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exempted[record] = true
}

func (s *specification) exempts(record string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exempted[record]
}

// fromKafka checks a record that a gateway has written.
func (s *specification) fromKafka(channel string, r *kgo.Record) error {
	headers := map[string]any{}
	for _, h := range r.Headers {
		headers[h.Key] = string(h.Value)
	}
	name := ""
	for n := range s.messages[channel] {
		name = n
	}
	if channel == "downstream" {
		if name = "forwarded"; headers["im-hop"] == nil || headers["gateway_id"] == nil {
			s.saw("downstream/downstream")
			return nil // somebody else's
		}
	}
	m := s.messages[channel][name]
	var value any
	_, omitted := headers["value_omitted"]
	var errs []error
	switch {
	case omitted && len(r.Value) > 0:
		errs = append(errs, errors.New("there is a value"))
	case m.payload != nil && !omitted && !s.exempts(string(r.Value)):
		var err error
		if value, err = jsonschema.UnmarshalJSON(bytes.NewReader(r.Value)); err == nil {
			err = m.payload.Validate(value)
		}
		errs = append(errs, err)
	}
	if m.headers == nil && len(headers) > 0 {
		errs = append(errs, fmt.Errorf("headers %v are not described", headers))
	} else if m.headers != nil {
		errs = append(errs, m.headers.Validate(headers))
	}
	if o, _ := value.(map[string]any); name != "deadletter" {
		user := o["user_id"] // of upstream records and events
		if name == "forwarded" {
			user = o["target_user_id"]
		}
		if name != "undelivered" && user != string(r.Key) || len(r.Key) == 0 {
			errs = append(errs, fmt.Errorf("the key is %q, the user %v", r.Key, user))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s, record %.300s: %w", r.Topic, r.Value, err)
	}
	s.saw(channel+"/"+name, value, headers)
	return nil
}

// channelOf is the channel of a topic.
func channelOf(topic string) string {
	switch {
	case strings.HasPrefix(topic, downstreamPrefix):
		return "downstream"
	case topic == "im-user-events-topic":
		return "userEvents"
	}
	return strings.TrimSuffix(strings.TrimPrefix(topic, "im-"), "-topic")
}

// readTopics checks all that the gateways have written, and returns the errors.
func (s *specification) readTopics(ctx context.Context) error {
	list, err := kadm.NewClient(env.kafka).ListTopics(ctx)
	if err != nil {
		return fmt.Errorf("list topics: %w", err)
	}
	topics := slices.Clone(sharedTopics)
	for name := range list {
		if strings.HasPrefix(name, downstreamPrefix) {
			topics = append(topics, name)
		}
	}
	var errs []error
	err = readAll(ctx, topics, func(r *kgo.Record) {
		if err := s.fromKafka(channelOf(r.Topic), r); err != nil && len(errs) < 10 {
			errs = append(errs, err)
		}
	})
	return errors.Join(append(errs, err)...)
}

// readAll reads topics from their beginnings to where they end now.
func readAll(ctx context.Context, topics []string, each func(*kgo.Record)) error {
	admin := kadm.NewClient(env.kafka)
	ends, err := admin.ListEndOffsets(ctx, topics...)
	if err != nil {
		return fmt.Errorf("list ends: %w", err)
	}
	starts, err := admin.ListStartOffsets(ctx, topics...)
	if err != nil {
		return fmt.Errorf("list starts: %w", err)
	}
	open := map[string]int64{} // the end of what is not read yet
	from := map[string]map[int32]kgo.Offset{}
	key := func(topic string, partition int32) string { return fmt.Sprint(topic, "/", partition) }
	ends.Each(func(o kadm.ListedOffset) {
		start, _ := starts.Lookup(o.Topic, o.Partition)
		if o.Err != nil || start.Offset >= o.Offset {
			return
		}
		open[key(o.Topic, o.Partition)] = o.Offset
		if from[o.Topic] == nil {
			from[o.Topic] = map[int32]kgo.Offset{}
		}
		from[o.Topic][o.Partition] = kgo.NewOffset().At(start.Offset)
	})
	c, err := kgo.NewClient(kgo.SeedBrokers(env.brokers...), kgo.ConsumePartitions(from))
	if err != nil {
		return fmt.Errorf("kafka client: %w", err)
	}
	defer c.Close()
	for len(open) > 0 {
		fetches := c.PollFetches(ctx)
		if ctx.Err() != nil {
			return fmt.Errorf("read topics, %d partitions are left: %w", len(open), ctx.Err())
		}
		fetches.EachRecord(func(r *kgo.Record) {
			each(r)
			if at := key(r.Topic, r.Partition); r.Offset+1 >= open[at] {
				delete(open, at)
			}
		})
	}
	return nil
}

// missing lists what the documents name and nobody has seen.
func (s *specification) missing() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := maps.Clone(s.fields)
	for channel, messages := range s.messages {
		for name := range messages {
			all[channel+"/"+name] = true
		}
	}
	maps.DeleteFunc(all, func(name string, _ bool) bool { return s.seen[name] })
	return slices.Sorted(maps.Keys(all))
}
