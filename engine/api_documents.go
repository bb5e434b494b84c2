package engine

import (
	"embed"
	"fmt"
	"io/fs"
	"net/http"
	"strings"

	"im-gateway/codec/proto"
)

// specs are the descriptions of the gateway's interfaces: HTTP in openapi.json, WebSocket and Kafka in
// asyncapi.json, and the schemas that both refer to by relative paths, which lead there on the disk and on
// the public port alike. Tests hold them against what is served and against what a running gateway sends.
//
//go:embed openapi.json asyncapi.json schemas
var specs embed.FS

// document is one of the descriptions.
type document struct {
	kind string // its Content-Type
	body []byte
}

// loadDocuments returns all of them, and the protobuf files, by their paths on the public port.
func loadDocuments() (map[string]document, error) {
	list := map[string]document{}
	for prefix, files := range map[string]fs.FS{"/": specs, "/proto/": proto.Files} {
		err := fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			body, err := fs.ReadFile(files, name)
			list[prefix+name] = document{kindOf(name), body}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("embedded documents: %w", err)
		}
	}
	return list, nil
}

func kindOf(name string) string {
	switch {
	case strings.HasSuffix(name, ".proto"):
		return "text/plain; charset=utf-8"
	case strings.HasPrefix(name, "schemas/"):
		return "application/schema+json"
	}
	return "application/json"
}

func serveDocument(c *call) {
	d := c.api.documents[c.r.URL.Path]
	h := c.w.Header()
	h.Set("Access-Control-Allow-Origin", "*") // tools on other origins show the documents
	h.Set("Cache-Control", "max-age=300")
	h.Set("Content-Type", d.kind)
	c.write(http.StatusOK, d.body)
}
