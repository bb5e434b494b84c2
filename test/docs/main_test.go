package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func document(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.md")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "'''", "```")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTry(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	t.Chdir("../..")
	for name, tc := range map[string]struct{ text, wrong string }{
		"variables and directory go on": {"'''sh\nA='two words'\nmkdir -p sub\ncd sub\n'''\n'''sh\necho \"$A in $(basename \"$PWD\")\"\n'''\n'''text output\ntwo … in sub\n'''\n", ""},
		"a clone":                       {"'''sh\ntest -f go.mod\n'''\n", ""},
		"background": {"'''sh background until=\"ready\"\nsleep 0.2; echo ready; exec sleep 100\n'''\n'''text output\nready\n'''\n" +
			"'''sh until=\"4\"\necho x >>n; wc -l n\n'''\n", ""},
		"background that prints later": {"'''sh background until=\"ready\"\necho ready; until [ -f go ]; do sleep 0.1; done; echo later; exec sleep 100\n'''\n" +
			"'''sh\ntouch go\n'''\n'''text output background\nready\nlater\n'''\n", ""},
		"nothing in the background":   {"'''sh\necho a\n'''\n'''text output background\na\n'''\n", "nothing was started"},
		"a failing command":           {"'''sh\necho before\nfalse\necho behind\n'''\n", "x.md:1"},
		"in a pipe":                   {"'''sh\nfalse | cat\n'''\n", "x.md:1"},
		"other output":                {"'''sh\necho a\n'''\n\n'''text output\nb\n'''\n", "x.md:5: it did not print: b"},
		"output in another order":     {"'''sh\nprintf 'a\\nb\\n'\n'''\n'''text output\nb\na\n'''\n", "did not print: a"},
		"background that ends":        {"'''sh background until=\"ready\"\necho no\n'''\n", `before it printed "ready"`},
		"not run":                     {"'''sh not-run\nfalse\n'''\n'''json\n{\n'''\n", ""},
		"a typing error":              {"'''sh notrun\nfalse\n'''\n", "notrun"},
		"an attribute of a wrong one": {"'''text until=\"x\"\n'''\n", "what is a block of"},
		"no end":                      {"'''sh\nfalse\n", "does not end"},
	} {
		t.Run(name, func(t *testing.T) {
			err := try(t.Context(), document(t, tc.text))
			if (err == nil) != (tc.wrong == "") || err != nil && !strings.Contains(err.Error(), tc.wrong) {
				t.Errorf("%v, want %q", err, tc.wrong)
			}
		})
	}
}
