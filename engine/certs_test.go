package engine

import (
	"bytes"
	"crypto/tls"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// TestCertificateIsReadAgain: a new pair is used, and a broken one is not.
func TestCertificateIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writePair := func(name string) []byte {
		from, fromKey := testCertificate(t, t.TempDir(), name)
		for to, from := range map[string]string{cert: from, key: fromKey} {
			b, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Certificate[0]
	}
	first := writePair("first.example")
	c, err := newCerts(cert, key, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	serves := func(want []byte) bool {
		c.mu.Lock()
		c.looked = time.Time{} // a second has passed
		c.mu.Unlock()
		got, err := c.Certificate(nil)
		return err == nil && bytes.Equal(got.Certificate[0], want)
	}
	if !serves(first) {
		t.Error("not the first")
	}
	if err := os.WriteFile(key, []byte("half a key"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !serves(first) {
		t.Error("a broken pair was taken")
	}
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	if !serves(first) {
		t.Error("no certificate without the file")
	}
	if second := writePair("second.example"); !serves(second) {
		t.Error("not the second")
	}
	if _, err := newCerts(cert, filepath.Join(dir, "none.pem"), zerolog.Nop()); err == nil {
		t.Error("a missing key was taken")
	}
}
