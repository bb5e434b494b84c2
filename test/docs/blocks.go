// Command docs runs the command blocks of tutorials and how-to guides as a reader would, from the top
// of each document to its end, and compares what they print with what the document says they print:
//
//	go run ./test/docs docs/tutorial.md docs/howto/*.md
//
// In a document a fenced block is, by what follows its three backticks:
//
//	sh               run by bash; it must succeed
//	sh background    started; it runs on until the document ends. until="TEXT": wait until it has printed that
//	sh until="TEXT"  run again until it prints that, for up to a minute
//	sh not-run       not run, as it needs what is not at hand; the document must say so, and it is counted
//	text output      printed by the block before it: each line must occur there, in this order; … stands for anything
//	text output background
//	                 the same, of what was started last: within a minute
//
// Each document has a clone of the repository of its own as its directory, and, where the process may
// make one (root on Linux), a network of its own, so that default ports are free; two are run at a time then.
// What has been built in bin/ and fetched to .cache/ is taken along.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
)

// mode is what is done about a block.
type mode int

const (
	ignored mode = iota
	run
	background
	notRun
	output
	outputLater
)

// block is one fenced block.
type block struct {
	mode  mode
	line  int // of its opening fence
	until string
	text  string
}

var untilAttribute = regexp.MustCompile(`\buntil="([^"]*)"`)

// readBlocks returns the blocks of a document that concern us. Unknown words behind `sh` are errors: a typing
// error must not switch a block off.
func readBlocks(path string) ([]block, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the document: %w", err)
	}
	defer func() { _ = f.Close() }()
	var list []block
	var b *block
	var text strings.Builder
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		s := lines.Text()
		info, fence := strings.CutPrefix(strings.TrimSpace(s), "```")
		switch {
		case !fence && b != nil:
			text.WriteString(s + "\n")
		case !fence:
		case b == nil:
			m, until, err := parseInfo(info)
			if err != nil {
				return nil, fmt.Errorf("%s:%d: %w", path, n, err)
			}
			b = &block{mode: m, line: n, until: until}
		default:
			if b.text = text.String(); b.mode != ignored {
				list = append(list, *b)
			}
			b = nil
			text.Reset()
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the document: %w", err)
	}
	if b != nil {
		return nil, fmt.Errorf("%s:%d: the block does not end", path, b.line)
	}
	return list, nil
}

func parseInfo(info string) (m mode, until string, err error) {
	if a := untilAttribute.FindStringSubmatch(info); a != nil {
		until = a[1]
		info = untilAttribute.ReplaceAllString(info, "")
	}
	switch strings.Join(strings.Fields(info), " ") {
	case "sh":
		return run, until, nil
	case "sh background":
		return background, until, nil
	case "sh not-run":
		return notRun, "", nil
	case "text output":
		return output, "", nil
	case "text output background":
		return outputLater, "", nil
	}
	if strings.HasPrefix(info, "sh") || until != "" {
		return ignored, "", fmt.Errorf("what is a block of %q?", info)
	}
	return ignored, "", nil
}

// matches reports where printed differs from what a document says is printed.
func matches(printed, said string) error {
	rest := strings.Split(printed, "\n")
	for want := range strings.Lines(said) {
		want = strings.TrimSpace(want)
		if want == "" || want == "…" {
			continue
		}
		parts := strings.Split(want, "…")
		for i := range parts {
			parts[i] = regexp.QuoteMeta(strings.TrimSpace(parts[i]))
		}
		re, err := regexp.Compile(strings.Join(parts, ".*"))
		if err != nil {
			return fmt.Errorf("compare with %q: %w", want, err)
		}
		for len(rest) > 0 && !re.MatchString(rest[0]) {
			rest = rest[1:]
		}
		if len(rest) == 0 {
			return errors.New("it did not print: " + want)
		}
		rest = rest[1:]
	}
	return nil
}
