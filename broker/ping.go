package broker

import (
	"context"
	"errors"
	"fmt"

	"github.com/IBM/sarama"
)

// ErrLogin is returned by Reachable when a broker answers and refuses the login: waiting is of no use.
var ErrLogin = errors.New("kafka refuses the login")

// Reachable tries each broker once and returns nil when one of them answers and accepts the login. It
// is for the start, where the caller waits and tries again.
func (a *Admin) Reachable(ctx context.Context) error {
	l := newLink()
	defer l.cut()
	defer context.AfterFunc(ctx, l.cut)()
	conf := a.opts.config(l)
	errs := []error{ctx.Err()}
	for _, addr := range a.opts.Brokers {
		err := connects(addr, conf)
		if err == nil {
			return nil
		}
		if errors.Is(err, sarama.ErrSASLAuthenticationFailed) || errors.Is(err, sarama.ErrUnsupportedSASLMechanism) {
			err = errors.Join(ErrLogin, err)
		}
		errs = append(errs, fmt.Errorf("kafka broker %s: %w", addr, err))
	}
	return errors.Join(errs...)
}

func connects(addr string, conf *sarama.Config) error {
	b := sarama.NewBroker(addr)
	if err := b.Open(conf); err != nil {
		return err
	}
	defer func() { _ = b.Close() }()
	if _, err := b.Connected(); err != nil {
		return err
	}
	// The connection alone proves little: a proxy may hold it. Ask something.
	_, err := b.ApiVersions(&sarama.ApiVersionsRequest{Version: 3, ClientSoftwareName: "im-gateway", ClientSoftwareVersion: "1"})
	return err
}
