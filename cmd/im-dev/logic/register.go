package logic

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
)

// etcdTimeout bounds one attempt to register.
const etcdTimeout = 3 * time.Second

// register keeps the service's entry in etcd until ctx ends, and takes it out then. announced is
// called each time the entry has been written.
func (s *Service) register(ctx context.Context, etcd *clientv3.Client, addr string, announced func()) error {
	manager, err := endpoints.NewManager(etcd, s.o.ServiceName)
	if err != nil {
		return fmt.Errorf("etcd names of %s: %w", s.o.ServiceName, err)
	}
	key := s.o.ServiceName + "/" + addr
	for {
		var lease clientv3.LeaseID
		err := retry(ctx, s.logger, "register in etcd", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
			defer cancel()
			granted, err := etcd.Grant(ctx, int64(s.o.LeaseTTL/time.Second))
			if err != nil {
				return fmt.Errorf("grant a lease: %w", err)
			}
			lease = granted.ID
			return manager.AddEndpoint(ctx, key, endpoints.Endpoint{Addr: addr}, clientv3.WithLease(lease))
		})
		if err != nil {
			return ignoreStop(ctx, err)
		}
		s.logger.Info().Str("key", key).Msg("registered in etcd")
		announced()
		s.keepAlive(ctx, etcd, lease)
		if ctx.Err() != nil {
			s.deregister(etcd, lease)
			return nil
		}
		s.logger.Warn().Str("key", key).Msg("the lease in etcd is lost, registering again")
	}
}

// keepAlive returns when the lease is lost or ctx ends.
func (s *Service) keepAlive(ctx context.Context, etcd *clientv3.Client, lease clientv3.LeaseID) {
	kept, err := etcd.KeepAlive(ctx, lease)
	if err != nil {
		s.logger.Warn().Err(err).Msg("the lease in etcd cannot be kept")
		return
	}
	for range kept {
		// Each answer only says that the lease lives on; the channel is closed when it does not.
	}
}

func (s *Service) deregister(etcd *clientv3.Client, lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if _, err := etcd.Revoke(ctx, lease); err != nil {
		s.logger.Warn().Err(err).Msg("the entry in etcd could not be removed; it expires")
	}
}

// ignoreStop turns the error of a ctx that ended into nil.
func ignoreStop(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Cause(ctx)) || errors.Is(err, ctx.Err())) {
		return nil
	}
	return err
}
