package main

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// page is what links need to know of a document.
type page struct {
	anchors map[string]bool
	links   []string
}

func read(t *testing.T, path string) page {
	t.Helper()
	source, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p := page{anchors: map[string]bool{}}
	doc := goldmark.New(goldmark.WithExtensions(extension.Table)).Parser().Parse(text.NewReader(source))
	err = ast.Walk(doc, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if !entering {
			return ast.WalkContinue, nil
		}
		switch n := n.(type) {
		case *ast.Heading:
			a := anchor(plain(n, source))
			for i := 1; p.anchors[a]; i++ {
				a = fmt.Sprintf("%s-%d", strings.TrimSuffix(a, fmt.Sprintf("-%d", i-1)), i)
			}
			p.anchors[a] = true
		case *ast.Link:
			p.links = append(p.links, string(n.Destination))
		case *ast.Image:
			p.links = append(p.links, string(n.Destination))
		}
		return ast.WalkContinue, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// plain is a node's text without its marks.
func plain(n ast.Node, source []byte) string {
	var b strings.Builder
	for c := n.FirstChild(); c != nil; c = c.NextSibling() {
		if s, ok := c.(*ast.Text); ok {
			b.Write(s.Segment.Value(source))
		} else {
			b.WriteString(plain(c, source))
		}
	}
	return b.String()
}

// anchor is a heading's, as forges make it.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
			return unicode.ToLower(r)
		case r == ' ':
			return '-'
		}
		return -1
	}, heading)
}

// Every link of every document leads somewhere, and no document speaks of the machine it was written on.
func TestLinks(t *testing.T) {
	t.Chdir("../..")
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md").Output()
	if err != nil {
		t.Fatal(err)
	}
	pages := map[string]page{}
	for path := range strings.FieldsSeq(string(out)) {
		pages[path] = read(t, path)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, local := range []string{root, "/root/", "/home/", "/Users/"} {
			if strings.Contains(string(text), local) {
				t.Errorf("%s speaks of %s", path, local)
			}
		}
	}
	if len(pages) < 10 {
		t.Fatalf("only %d documents", len(pages))
	}
	for path, p := range pages {
		for _, link := range p.links {
			u, err := url.Parse(link)
			switch {
			case err != nil:
				t.Errorf("%s: %v", path, err)
				continue
			case u.Scheme == "http" || u.Scheme == "https":
				continue
			case u.Scheme != "" || u.Host != "" || strings.HasPrefix(u.Path, "/"):
				t.Errorf("%s: %s is no relative link", path, link)
				continue
			}
			target := path
			if u.Path != "" {
				target = filepath.Join(filepath.Dir(path), u.Path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %s leads nowhere", path, link)
				continue
			}
			if u.Fragment != "" && !pages[target].anchors[u.Fragment] {
				t.Errorf("%s: %s: no such heading", path, link)
			}
		}
	}
}

// Every test that a document names exists.
func TestNamedTests(t *testing.T) {
	t.Chdir("../..")
	there := map[string]bool{}
	out, err := exec.Command("git", "grep", "-ohE", `^func (Test|Fuzz)[A-Za-z0-9_]+`, "--", "*_test.go").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		there[strings.TrimPrefix(strings.TrimSpace(line), "func ")] = true
	}
	docs, err := exec.Command("git", "grep", "-ohE", `\b(Test|Fuzz)[A-Z][A-Za-z0-9_]+\b`, "--", "*.md").Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.FieldsSeq(string(docs)) {
		if !there[name] {
			t.Errorf("no test is called %s", name)
		}
	}
}

func TestAnchor(t *testing.T) {
	for heading, want := range map[string]string{
		"Guarantees, and what is not guaranteed": "guarantees-and-what-is-not-guaranteed",
		"HTTP":                                   "http",
		"`ctl`: top -n, a_b 2":                   "ctl-top--n-a_b-2",
	} {
		doc := "## " + heading + "\n"
		path := filepath.Join(t.TempDir(), "x.md")
		if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := read(t, path).anchors; !got[want] {
			t.Errorf("%q: %v, want %s", heading, got, want)
		}
	}
}
