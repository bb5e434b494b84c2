package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"im-gateway/engine"
)

// ctlTLS is what the flags say of TLS.
type ctlTLS struct {
	enabled                   bool
	ca, cert, key, serverName string
}

func (t ctlTLS) given() bool { return t != ctlTLS{} }

// dial makes the connection, which connects with the first call.
func (c *ctl) dial() (*grpc.ClientConn, error) {
	keys := []string{"grpc.addr", "grpc.tls"}
	if c.tokenFile == "" {
		keys = append(keys, "admin.token", "grpc.token")
	}
	cfg, err := engine.LoadPart(engine.Sources{File: c.config, Environ: c.environ}, keys...)
	if err != nil {
		return nil, err
	}
	secure, err := c.transport(cfg)
	if err != nil {
		return nil, err
	}
	token, err := c.token(cfg)
	if err != nil {
		return nil, err
	}
	if c.addr == "" {
		c.addr = local(cfg.GRPC.Addr)
	}
	if token != "" && secure == nil && !isLoopback(c.addr) {
		fmt.Fprintln(c.stderr, "warning: without TLS the token is sent in clear text")
	}
	transport := insecure.NewCredentials()
	if secure != nil {
		transport = credentials.NewTLS(secure)
	}
	opts := []grpc.DialOption{grpc.WithTransportCredentials(transport), grpc.WithDisableServiceConfig()}
	if token != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(bearer(token)))
	}
	conn, err := grpc.NewClient("passthrough:///"+c.addr, opts...)
	if err != nil {
		return nil, fmt.Errorf("-addr %s: %w", c.addr, err)
	}
	return conn, nil
}

// token is the operators' where there is one, else that of the gateways.
func (c *ctl) token(cfg *engine.Config) (string, error) {
	if c.tokenFile == "" {
		if cfg.Admin.Token != "" {
			return cfg.Admin.Token, nil
		}
		return cfg.GRPC.Token, nil
	}
	b, err := os.ReadFile(c.tokenFile)
	if err != nil {
		return "", fmt.Errorf("-token-file: %w", err)
	}
	token := strings.TrimRight(string(b), "\r\n")
	if token == "" {
		return "", fmt.Errorf("-token-file %s: the file is empty", c.tokenFile)
	}
	return token, nil
}

// transport is the TLS of the flags or, without any, of the configuration; nil: none.
func (c *ctl) transport(cfg *engine.Config) (*tls.Config, error) {
	if !c.tls.given() {
		secure, err := cfg.GRPC.TLS.Client(zerolog.Nop())
		if err != nil {
			return nil, fmt.Errorf("grpc.tls: %w", err)
		}
		return secure, nil
	}
	if (c.tls.cert == "") != (c.tls.key == "") {
		return nil, errors.New("-tls-cert and -tls-key must be given together")
	}
	secure, err := engine.TLS{
		Enabled: true, CAFile: c.tls.ca, CertFile: c.tls.cert, KeyFile: c.tls.key, ServerName: c.tls.serverName,
	}.Client()
	if err != nil {
		return nil, fmt.Errorf("-tls-ca, -tls-cert, -tls-key: %w", err)
	}
	return secure, nil
}

// local is the address by which this machine reaches a listener.
func local(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return listen
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// bearer sends a token with each call, with or without TLS.
type bearer string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return false }

// explain says what is wrong and what to do.
func (c *ctl) explain(err error) error {
	s := status.Convert(err)
	switch s.Code() {
	case codes.Unavailable:
		if _, cause, found := strings.Cut(s.Message(), "transport: "); found {
			cause = strings.TrimSuffix(strings.TrimPrefix(cause, "Error while dialing: "), `"`)
			return fmt.Errorf("no gateway can be reached at %s: %s; is it running, is this its grpc.addr, does it want TLS?", c.addr, cause)
		}
		if strings.Contains(s.Message(), "server preface") || strings.Contains(s.Message(), "tls: ") {
			return fmt.Errorf("no gateway can be reached at %s: %s; does one side use TLS and the other not?", c.addr, s.Message())
		}
	case codes.DeadlineExceeded:
		return fmt.Errorf("the gateway at %s has not answered in time; -timeout allows it longer", c.addr)
	case codes.Canceled:
		return errors.New("interrupted")
	case codes.Unauthenticated:
		return fmt.Errorf("the gateway at %s refuses: %s (-token-file, or IM_ADMIN_TOKEN_FILE in the environment)", c.addr, s.Message())
	case codes.FailedPrecondition, codes.ResourceExhausted:
		return fmt.Errorf("the gateway at %s refuses: %s", c.addr, s.Message())
	case codes.Unimplemented:
		return fmt.Errorf("the gateway at %s does not know this command: it is of an older version", c.addr)
	}
	return errors.New(s.Message())
}
