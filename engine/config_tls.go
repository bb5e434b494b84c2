package engine

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"github.com/rs/zerolog"
)

// Client returns the TLS configuration of a client, or nil when TLS is not enabled. Certificates
// are always verified; there is no key to turn that off.
func (t TLS) Client() (*tls.Config, error) {
	if !t.Enabled {
		return nil, nil
	}
	return clientTLS(t.CAFile, t.CertFile, t.KeyFile, t.ServerName)
}

// Client returns the TLS configuration for calls to other gateways, or nil when their servers,
// which are configured as this one is, use none. The certificate is read again when its files change.
func (t GRPCTLS) Client(log zerolog.Logger) (*tls.Config, error) {
	if t.CertFile == "" {
		return nil, nil
	}
	c, err := clientTLS(t.CAFile, "", "", t.ServerName)
	if err != nil {
		return nil, err
	}
	pair, err := newCerts(t.CertFile, t.KeyFile, log)
	if err != nil {
		return nil, err
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return pair.Certificate(nil)
	}
	return c, nil
}

// Server returns the TLS configuration of the gRPC server, or nil when TLS is not configured.
func (t GRPCTLS) Server(log zerolog.Logger) (*tls.Config, error) {
	authorities := ""
	if t.RequireClientCert {
		authorities = t.CAFile
	}
	return serverTLS(t.CertFile, t.KeyFile, authorities, log)
}

// Server returns the TLS configuration of the admin port, or nil when TLS is not configured.
func (t AdminTLS) Server(log zerolog.Logger) (*tls.Config, error) {
	return serverTLS(t.CertFile, t.KeyFile, t.ClientCAFile, log)
}

// serverTLS asks for client certificates when there are authorities for them. The server's own is read
// again when its files change.
func serverTLS(certFile, keyFile, clientAuthorities string, log zerolog.Logger) (*tls.Config, error) {
	if certFile == "" {
		return nil, nil
	}
	pair, err := newCerts(certFile, keyFile, log)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: pair.Certificate}
	if clientAuthorities != "" {
		if c.ClientCAs, err = loadAuthorities(clientAuthorities); err != nil {
			return nil, err
		}
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
}

// loads reports what is wrong inside the files. It is nil where a file is missing or its pair is
// not given: the checks of the keys themselves say that.
func (t TLS) loads() error {
	if !allReadable(t.CAFile, t.CertFile, t.KeyFile) || (t.CertFile == "") != (t.KeyFile == "") {
		return nil
	}
	_, err := t.Client()
	return err
}

// loads is as TLS.loads.
func (t GRPCTLS) loads() error {
	if !allReadable(t.CAFile, t.CertFile, t.KeyFile) || (t.CertFile == "") != (t.KeyFile == "") {
		return nil
	}
	_, err := t.Client(zerolog.Nop())
	return err
}

// loads is as TLS.loads.
func (t AdminTLS) loads() error {
	if !allReadable(t.ClientCAFile, t.CertFile, t.KeyFile) || (t.CertFile == "") != (t.KeyFile == "") {
		return nil
	}
	_, err := t.Server(zerolog.Nop())
	return err
}

func allReadable(files ...string) bool {
	for _, f := range files {
		if f != "" && !readable(f) {
			return false
		}
	}
	return true
}

func clientTLS(caFile, certFile, keyFile, serverName string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName}
	if caFile != "" {
		pool, err := loadAuthorities(caFile)
		if err != nil {
			return nil, err
		}
		c.RootCAs = pool
	}
	if certFile != "" {
		cert, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, fmt.Errorf("load certificate %s with key %s: %w", certFile, keyFile, err)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}

func loadAuthorities(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file) // #nosec G304 -- named in the configuration
	if err != nil {
		return nil, fmt.Errorf("read certificate authorities: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("read certificate authorities: no certificate in " + file)
	}
	return pool, nil
}
