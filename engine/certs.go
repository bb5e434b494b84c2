package engine

import (
	"crypto/tls"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// certLook is how often the files of a certificate are looked at, at most.
const certLook = time.Second

// certs is a certificate that is read again when its files change, at a handshake. A pair that cannot
// be used leaves the one before in place.
type certs struct {
	certFile, keyFile string
	log               zerolog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	looked  time.Time
	stamp   [2]fileStamp // of the files that were read last, in use or not
}

type fileStamp struct {
	changed time.Time
	size    int64
}

// newCerts reads the certificate.
func newCerts(certFile, keyFile string, log zerolog.Logger) (*certs, error) {
	c := &certs{certFile: certFile, keyFile: keyFile, log: log, looked: time.Now()}
	c.stamp = c.files()
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("read the certificate %s with the key %s: %w", certFile, keyFile, err)
	}
	c.current = &pair
	return c, nil
}

func (c *certs) files() (s [2]fileStamp) {
	for i, name := range []string{c.certFile, c.keyFile} {
		if info, err := os.Stat(name); err == nil { // a file that is missing counts as changed, too
			s[i] = fileStamp{info.ModTime(), info.Size()}
		}
	}
	return s
}

// Certificate serves tls.Config.GetCertificate, from any goroutine.
func (c *certs) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.looked) >= certLook {
		c.looked = now
		c.reload()
	}
	return c.current, nil
}

func (c *certs) reload() {
	stamp := c.files()
	if stamp == c.stamp {
		return
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		// The other file may follow in a moment: what is there then has another stamp, or this one
		// stays wrong and is not read again.
		c.log.Warn().Err(err).Str("cert_file", c.certFile).Msg("the changed certificate cannot be used; the one before stays in use")
	} else {
		c.current = &pair
		c.log.Info().Str("cert_file", c.certFile).Msg("certificate read again")
	}
	c.stamp = stamp
}
