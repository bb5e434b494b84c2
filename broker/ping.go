package broker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/IBM/sarama"
)

// ErrLogin is returned by Reachable when a broker answers and refuses the login: waiting is of no use.
var ErrLogin = errors.New("kafka refuses the login")

// impatience is how long Reachable waits for one broker until it asks the next one, too.
const impatience = 500 * time.Millisecond

// Reachable asks the brokers, in no order, and returns nil when one of them answers and accepts the login. One
// that is away, or frozen, does not keep the others from being asked. It is for the start, and for those who
// watch; the caller waits and tries again.
func (a *Admin) Reachable(ctx context.Context) error {
	var asking sync.WaitGroup
	defer asking.Wait()
	l := newLink()
	defer l.cut()
	defer context.AfterFunc(ctx, l.cut)()
	conf := a.opts.config(l)
	brokers := slices.Clone(a.opts.Brokers)
	rand.Shuffle(len(brokers), func(i, j int) { brokers[i], brokers[j] = brokers[j], brokers[i] })
	answers := make(chan error, len(brokers))
	errs := []error{ctx.Err()}
	next := time.NewTimer(0)
	defer next.Stop()
	for asked, answered := 0, 0; answered < len(brokers); {
		select {
		case <-next.C:
			if asked == len(brokers) {
				continue
			}
			addr := brokers[asked]
			asking.Go(func() { answers <- connects(addr, conf) })
			asked++
			next.Reset(impatience)
		case err := <-answers:
			if err == nil {
				return nil
			}
			errs = append(errs, err)
			answered++
			next.Reset(0)
		}
	}
	return errors.Join(errs...)
}

func connects(addr string, conf *sarama.Config) error {
	err := ask(addr, conf)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sarama.ErrSASLAuthenticationFailed), errors.Is(err, sarama.ErrUnsupportedSASLMechanism):
		err = errors.Join(ErrLogin, err)
	}
	return fmt.Errorf("kafka broker %s: %w", addr, err)
}

func ask(addr string, conf *sarama.Config) error {
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
