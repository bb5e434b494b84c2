package engine

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// testCertificate writes a self-signed certificate for host and 127.0.0.1, good for servers, clients
// and as an authority, and its key.
func testCertificate(t *testing.T, dir, host string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: host},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		DNSNames:              []string{host},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, host+".pem"), filepath.Join(dir, host+"-key.pem")
	for path, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: der},
		keyFile:  {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := testCertificate(t, dir, "server.test")
	otherCert, otherKey := testCertificate(t, dir, "other.test")
	mutual := GRPCTLS{CertFile: cert, KeyFile: key, CAFile: cert, RequireClientCert: true}
	open := GRPCTLS{CertFile: cert, KeyFile: key}
	for _, tc := range []struct {
		name   string
		server GRPCTLS
		client TLS
		ok     bool
	}{
		{"authority", open, TLS{Enabled: true, CAFile: cert}, true},
		{"server name", open, TLS{Enabled: true, CAFile: cert, ServerName: "server.test"}, true},
		{"wrong server name", open, TLS{Enabled: true, CAFile: cert, ServerName: "x.test"}, false},
		{"system's authorities", open, TLS{Enabled: true}, false},
		{"other authority", open, TLS{Enabled: true, CAFile: otherCert}, false},
		{"mutual", mutual, TLS{Enabled: true, CAFile: cert, CertFile: cert, KeyFile: key}, true},
		{"mutual without certificate", mutual, TLS{Enabled: true, CAFile: cert}, false},
		{"mutual with another's", mutual, TLS{Enabled: true, CAFile: cert, CertFile: otherCert, KeyFile: otherKey}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := tc.server.Server(zerolog.Nop())
			if err != nil {
				t.Fatal(err)
			}
			c, err := tc.client.Client()
			if err != nil {
				t.Fatal(err)
			}
			if c.ServerName == "" {
				c.ServerName = "127.0.0.1"
			}
			if err := handshake(t, s, c); (err == nil) != tc.ok {
				t.Errorf("handshake: %v, want success %t", err, tc.ok)
			}
		})
	}
	if c, err := (TLS{}).Client(); c != nil || err != nil {
		t.Errorf("TLS that is not enabled: %v, %v", c, err)
	}
}

// handshake returns the error of either side.
func handshake(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		if err == nil {
			_, err = conn.Write([]byte("x"))
			_ = conn.Close()
		}
		done <- err
	}()
	conn, err := tls.Dial("tcp", ln.Addr().String(), client)
	if err == nil {
		_, err = conn.Read(make([]byte, 1)) // a refused client certificate shows only here
		_ = conn.Close()
	}
	if e := <-done; err == nil {
		err = e
	}
	return err
}
