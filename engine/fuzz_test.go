package engine

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// FuzzSetting gives one key any value, in the environment and in a file: it is taken, or a problem names
// the key. What a secret holds is in no text.
func FuzzSetting(f *testing.F) {
	all := options()
	for i := range all {
		for _, value := range []string{"", "0", "-1s", "1GiB", "true", "a,b", "::1", "https://a.example/x", "\x00", "9999999999999999999"} {
			if (i+len(value))%11 == 0 {
				f.Add(uint16(i), value)
			}
		}
	}
	path := filepath.Join(f.TempDir(), "f.yaml")
	f.Fuzz(func(t *testing.T, key uint16, value string) {
		o := all[int(key)%len(all)]
		base := []string{testSecret}
		if o.key == "auth.hs256_secret" {
			base = nil
		}
		fromEnviron := outcome(t, Sources{Environ: append(base, o.env+"="+value)}, &o, value)
		if strings.ContainsFunc(value, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
			return // YAML has its own rules for these
		}
		quoted := o.key + ": '" + strings.ReplaceAll(value, "'", "''") + "'\n"
		if err := os.WriteFile(path, []byte(quoted), 0o600); err != nil {
			t.Fatal(err)
		}
		if fromFile := outcome(t, Sources{File: path, Environ: base}, &o, value); fromFile != fromEnviron {
			t.Errorf("%s = %q: taken from the environment: %v, from a file: %v", o.key, value, fromEnviron, fromFile)
		}
	})
}

// outcome tells whether the sources are taken, in which the option has the value.
func outcome(t *testing.T, from Sources, o *option, value string) bool {
	_, err := Load(from)
	if err == nil {
		return true
	}
	var e *ConfigError
	if !errors.As(err, &e) {
		t.Fatalf("%s = %q: %v", o.key, value, err)
	}
	section, _, _ := strings.Cut(o.key, ".")
	if !slices.ContainsFunc(e.Problems, func(p Problem) bool {
		return p.Key == o.key || strings.HasPrefix(p.Key, section) || strings.Contains(p.Message, o.key)
	}) {
		t.Errorf("%s = %q: no problem names the key: %v", o.key, value, err)
	}
	if o.secret && len(value) > 12 && strings.Contains(err.Error(), value) {
		t.Errorf("%s: the secret %q is in the text: %v", o.key, value, err)
	}
	return false
}

// FuzzSecretInFile: whatever is wrong with a file, what it holds of secrets is not in the text that says so.
func FuzzSecretInFile(f *testing.F) {
	const secret = "kZ5vQ0secretW8xP2mL7"
	f.Add("auth: {hs256_secret: " + secret + "}\n")
	f.Add("auth: {hs256_secret: [" + secret + "]}\nhttp: 1\n")
	f.Add("etcd.password: \"" + secret + "\"\n x: y\n\t")
	f.Add("redis: {password: !!int " + secret + ", addr: 1}\n")
	f.Add("kafka: {sasl: {password: {a: " + secret + "}}}\n")
	f.Add("auth: {hs256_secret: &" + "a " + secret + ", previous_secret: *b}\n")
	secrets := []string{}
	for _, o := range options() {
		if o.secret {
			secrets = append(secrets, o.key)
			f.Add(o.key + ": " + secret + "\n")
		}
	}
	path := filepath.Join(f.TempDir(), "f.yaml")
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "_file") {
			return // it may name any file of this machine
		}
		// Only where it stands as a secret's value.
		at := strings.Index(text, secret)
		if at < 0 || !slices.ContainsFunc(secrets, func(key string) bool {
			return strings.HasPrefix(text[strings.LastIndexByte(text[:at], '\n')+1:], key+": ") || strings.HasPrefix(text, key+": ")
		}) {
			return
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(Sources{File: path}); err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v", text, err)
		}
	})
}
