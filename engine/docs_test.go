package engine

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityDocument: every test, abuse and key that docs/security.md names exists.
func TestSecurityDocument(t *testing.T) {
	doc, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != "..":
			return filepath.SkipDir
		case strings.HasSuffix(path, "_test.go"):
			b, err := os.ReadFile(path)
			tests.Write(b)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(string(doc), -1)
	if len(named) < 20 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, name := range named {
		if !strings.Contains(tests.String(), "func "+name+"(") {
			t.Errorf("there is no %s", name)
		}
	}
	rows, err := os.ReadFile("../test/abuse/rows.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`\*abuse: ([^*]+)\*`).FindAllStringSubmatch(string(doc), -1) {
		if m[1] != "NAME" && !strings.Contains(string(rows), `"`+m[1]+`"`) {
			t.Errorf("there is no abuse %q", m[1])
		}
	}
	keys := map[string]bool{}
	for _, o := range options() {
		keys[o.key] = true
	}
	for _, m := range regexp.MustCompile("`((?:http|websocket|limits|auth|grpc|admin)\\.[a-z0-9_.]+)`").FindAllStringSubmatch(string(doc), -1) {
		if !keys[m[1]] && !keys[strings.TrimSuffix(m[1], "_file")] {
			t.Errorf("there is no key %s", m[1])
		}
	}
}
