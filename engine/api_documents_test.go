package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"im-gateway/codec"
)

// served loads documents, by URLs of a host of no name, as they are served.
type served struct{ *API }

// Load implements jsonschema.URLLoader.
func (s served) Load(address string) (any, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	w := do(s.API, http.MethodGet, u.Path, "")
	if w.Code != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %d", u.Path, w.Code)
	}
	return jsonschema.UnmarshalJSON(w.Body)
}

func (s served) compiler() *jsonschema.Compiler {
	c := jsonschema.NewCompiler()
	c.UseLoader(s)
	return c
}

// TestOpenAPI holds the document against what is served, both ways.
func TestOpenAPI(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, nil)
	w := do(a, "GET", "/openapi.json", "")
	var doc struct {
		OpenAPI string
		Paths   map[string]map[string]struct {
			Parameters []struct{ Schema struct{ Enum []string } }
			Responses  map[string]json.RawMessage
		}
	}
	if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(doc.OpenAPI, "3.1.") {
		t.Errorf("openapi %q", doc.OpenAPI)
	}
	const schemaPath = "/schemas/{name}"
	var schemas []string
	for path, rt := range a.routes {
		if name, ok := strings.CutPrefix(path, "/schemas/"); ok {
			schemas = append(schemas, name)
			path = schemaPath
		}
		if _, there := doc.Paths[path][strings.ToLower(rt.methods[0])]; !there {
			t.Errorf("%s %s is served and not described", rt.methods[0], path)
		}
	}
	if told := doc.Paths[schemaPath]["get"].Parameters[0].Schema.Enum; !slices.Equal(told, slices.Sorted(slices.Values(schemas))) {
		t.Errorf("the schemas %q are described, and served %q", told, schemas)
	}
	for path, methods := range doc.Paths {
		path = strings.ReplaceAll(path, "{name}", "types.json")
		for method, op := range methods {
			rt := a.routes[path]
			if rt == nil || !strings.EqualFold(rt.methods[0], method) {
				t.Errorf("%s %s is described and not served", method, path)
				continue
			}
			// What an empty request gets must be described.
			got := fmt.Sprint(do(a, strings.ToUpper(method), path, "{}").Code)
			if _, there := op.Responses[got]; !there {
				t.Errorf("%s %s: the status %s is not described", method, path, got)
			}
		}
	}
}

// TestReferences: every reference in a document leads to something that is served, and every schema is what
// the latest draft of JSON Schema calls one.
func TestReferences(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, nil)
	compiler := served{a}.compiler()
	for at, d := range a.documents {
		w := do(a, http.MethodGet, at, "")
		if got := w.Header(); w.Code != http.StatusOK || got.Get("Content-Type") != d.kind || got.Get("Access-Control-Allow-Origin") != "*" {
			t.Errorf("%s: %d, %v", at, w.Code, got)
		}
		if !bytes.Equal(w.Body.Bytes(), d.body) || len(d.body) == 0 {
			t.Errorf("%s is not what is embedded", at)
		}
		if strings.HasSuffix(at, ".proto") {
			continue
		}
		var doc any
		if err := json.Unmarshal(d.body, &doc); err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		walk(doc, func(o map[string]any) {
			ref, ok := o["$ref"].(string)
			if !ok {
				return
			}
			file, pointer, _ := strings.Cut(ref, "#")
			target := at
			if file != "" {
				target = path.Join(path.Dir(at), file)
			}
			if !leads(a.documents[target].body, pointer) {
				t.Errorf("%s: the reference to %s leads nowhere", at, ref)
			}
		})
		if strings.HasPrefix(at, "/schemas/") {
			if _, err := compiler.Compile("http://gateway" + at); err != nil {
				t.Errorf("%s: %v", at, err)
			}
			described(t, at, doc)
		}
	}
}

// walk calls f for every JSON object in v.
func walk(v any, f func(map[string]any)) {
	switch v := v.(type) {
	case map[string]any:
		f(v)
		for _, inner := range v {
			walk(inner, f)
		}
	case []any:
		for _, inner := range v {
			walk(inner, f)
		}
	}
}

// leads tells whether there is something at a JSON pointer (RFC 6901) in a document.
func leads(doc []byte, pointer string) bool {
	var v any
	if json.Unmarshal(doc, &v) != nil {
		return false
	}
	for _, token := range strings.Split(pointer, "/")[1:] {
		token = strings.NewReplacer("~1", "/", "~0", "~").Replace(token)
		switch at := v.(type) {
		case map[string]any:
			v = at[token]
		case []any:
			i, err := strconv.Atoi(token)
			if err != nil || i >= len(at) {
				return false
			}
			v = at[i]
		default:
			return false
		}
	}
	return v != nil
}

// described wants a title of each schema, and of each field what it is: in words, or by its only value.
func described(t *testing.T, at string, doc any) {
	t.Helper()
	if top, _ := doc.(map[string]any); top["title"] == nil || top["description"] == nil || top["$schema"] != "https://json-schema.org/draft/2020-12/schema" {
		t.Errorf("%s has no title, no description, or another $schema", at)
	}
	walk(doc, func(o map[string]any) {
		fields, _ := o["properties"].(map[string]any)
		if o["type"] != "object" { // a condition on fields that are described elsewhere
			return
		}
		for name, field := range fields {
			f, _ := field.(map[string]any)
			if f["description"] == nil && f["$ref"] == nil && f["const"] == nil && f["enum"] == nil && f["properties"] == nil && f["oneOf"] == nil {
				t.Errorf("%s: %s is not described", at, name)
			}
		}
	})
}

// asyncAPI is what the tests read of asyncapi.json.
type asyncAPI struct {
	AsyncAPI string
	Channels map[string]struct {
		Messages map[string]struct {
			Ref              string `json:"$ref"` // to one of another channel
			Headers, Payload *struct {
				SchemaFormat string
				Schema       struct {
					Ref string `json:"$ref"`
				}
			}
			Examples []struct{ Headers, Payload any }
		}
		CloseCodes []struct{ Code int } `json:"x-close-codes"`
	}
	Operations map[string]json.RawMessage
}

// TestAsyncAPI: the examples are valid, every message is part of an operation, and the codes are those of the
// code.
func TestAsyncAPI(t *testing.T) {
	a := testAPI(t, &fakeAuth{}, nil)
	text := do(a, http.MethodGet, "/asyncapi.json", "").Body.Bytes()
	var doc asyncAPI
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(doc.AsyncAPI, "3.") {
		t.Errorf("asyncapi %q", doc.AsyncAPI)
	}
	compiler := served{a}.compiler()
	operations, err := json.Marshal(doc.Operations)
	if err != nil {
		t.Fatal(err)
	}
	valid := func(where, ref string, v any) {
		schema, err := compiler.Compile("http://gateway/" + ref)
		if err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(v); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	examples := 0
	for channel, c := range doc.Channels {
		for name, m := range c.Messages {
			if !bytes.Contains(operations, []byte(`"#/channels/`+channel+`/messages/`+name+`"`)) {
				t.Errorf("no operation has the message %s of %s", name, channel)
			}
			for _, e := range m.Examples {
				examples++
				valid("the example of "+name, m.Payload.Schema.Ref, e.Payload)
				if e.Headers != nil {
					valid("the example of "+name, m.Headers.Schema.Ref, e.Headers)
				}
			}
			if (m.Payload == nil || m.Ref != "") != (len(m.Examples) == 0) {
				t.Errorf("%s: there is a schema without an example", name)
			}
		}
	}
	if examples == 0 {
		t.Error("there are no examples")
	}

	source, err := os.ReadFile("../codec/codes.go")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]bool{}
	for _, c := range doc.Channels["json"].CloseCodes {
		told[fmt.Sprint(c.Code)] = true
	}
	// 1000 only answers a client's own; the others are never on the wire.
	same(t, "close codes", told, `CloseCode = (\d+)`, source, "1000", "1005", "1006")
	var types struct {
		Defs struct{ Code struct{ Enum []string } } `json:"$defs"`
	}
	if err := json.Unmarshal(a.documents["/schemas/types.json"].body, &types); err != nil {
		t.Fatal(err)
	}
	clear(told)
	for _, c := range types.Defs.Code.Enum {
		told[c] = true
	}
	same(t, "codes", told, `Code += "([A-Z_]+)"`, source, string(codec.SessionNotFound)) // over HTTP only
	var headers struct {
		Properties struct{ Reason struct{ Enum []string } }
	}
	if err := json.Unmarshal(a.documents["/schemas/kafka-undelivered-headers.json"].body, &headers); err != nil {
		t.Fatal(err)
	}
	var reasons []string
	for end := codec.EndDelivered + 1; end < codec.EndForwarded; end++ {
		reasons = append(reasons, end.String())
	}
	if !slices.Equal(headers.Properties.Reason.Enum, reasons) {
		t.Errorf("the reasons %q are described, there are %q", headers.Properties.Reason.Enum, reasons)
	}
}

// same compares what is told with what the source has.
func same(t *testing.T, what string, told map[string]bool, pattern string, source []byte, but ...string) {
	t.Helper()
	have := map[string]bool{}
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(source), -1) {
		if name := strings.Join(m[1:], ""); !slices.Contains(but, name) {
			have[name] = true
		}
	}
	if !maps.Equal(told, have) {
		t.Errorf("%s: %v are described, there are %v", what, told, have)
	}
}
