package engine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"im-gateway/broker"
	"im-gateway/codec"
	"im-gateway/codec/logicpb"
	"im-gateway/engine/tracing"
	"im-gateway/registry"
	"im-gateway/shard"
	"im-gateway/transport"
)

// start brings the parts up in order. What it has started when it fails, stop ends.
func (e *Engine) start(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		e.startAdmin, e.startEtcd, e.startTopics, e.startRedis, e.startKeys, e.startDenyList, e.startTracing, e.startShards, e.startKafka,
		e.startListener, e.startRegistration, e.startReloads,
	} {
		if err := step(ctx); err != nil {
			return err
		}
		select {
		case err := <-e.failed:
			return err
		default:
		}
	}
	return nil
}

// startAdmin comes first: /readyz says what the rest waits for.
func (e *Engine) startAdmin(context.Context) error {
	e.operator = NewOperator(OperatorOptions{
		Config: e.config, Version: Version(), Started: e.started, Readiness: e.ready, Dependencies: e.dependencies,
		Metrics: e.metrics, Logger: e.log, Drain: func() { e.askOnce.Do(func() { close(e.asked) }) },
	})
	var err error
	if e.acting, err = newActingToken(e.cfg.Admin.Token, e.metrics); err != nil {
		return err
	}
	h, err := NewAdmin(AdminOptions{
		GatewayID: e.cfg.GatewayID, Version: Version(), Readiness: e.ready, Registry: e.metrics, Logger: e.log,
		Operator: e.operator, Token: e.acting,
	})
	if err != nil {
		return err
	}
	adminTLS, err := e.cfg.Admin.TLS.Server(e.log)
	if err != nil {
		return fmt.Errorf("admin.tls: %w", err)
	}
	ln, err := net.Listen("tcp", e.cfg.Admin.Addr)
	if err != nil {
		return fmt.Errorf("admin port (admin.addr): %w", err)
	}
	e.adminAddr = ln.Addr()
	if adminTLS != nil {
		ln = tls.NewListener(ln, adminTLS)
		if err := registerCertificate(e.metrics, "admin", adminTLS.GetCertificate); err != nil {
			return errors.Join(err, ln.Close())
		}
	}
	e.log.Info().Stringer("addr", e.adminAddr).Msg("admin port listens")
	e.goTask("admin", func(ctx context.Context) error { return ServeAdmin(ctx, ln, h, e.log) })
	return nil
}

func (e *Engine) startEtcd(ctx context.Context) error {
	tlsConfig, err := e.cfg.Etcd.TLS.Client()
	if err != nil {
		return fmt.Errorf("etcd.tls: %w", err)
	}
	err = e.await(ctx, needEtcd, func(ctx context.Context) error {
		if e.etcd == nil {
			client, err := registry.Connect(registry.EtcdOptions{
				Endpoints: e.cfg.Etcd.Endpoints, TLS: tlsConfig,
				Username: e.cfg.Etcd.Username, Password: e.cfg.Etcd.Password,
			})
			if err != nil {
				return err
			}
			e.etcd = client
		}
		return registry.Reachable(ctx, e.etcd)
	})
	if err != nil {
		return err
	}
	e.owner = registry.NewOwner(registry.OwnerOptions{
		Client: e.etcd, GatewayID: e.cfg.GatewayID, Random: e.random, Instance: e.instance(), LeaseTTL: e.cfg.Etcd.LeaseTTL, Logger: e.log,
	})
	if err := e.owner.Register(e.metrics); err != nil {
		return fmt.Errorf("the owner: %w", err)
	}
	e.gateways = registry.NewGateways(e.etcd, e.log)
	if err := registerGauge(e.metrics, "registry_gateways", "Gateways registered in etcd, this one among them, as far as is known.",
		func() int { return e.gateways.Known() }); err != nil {
		return err
	}
	e.goTask("gateways", func(ctx context.Context) error { e.gateways.Run(ctx); return nil })
	err = e.owner.Acquire(ctx, func(reason error) {
		e.ready.Waiting(needEtcd, reason.Error())
		e.log.Warn().Err(reason).Msg("waiting for the ownership of the downstream topic")
	})
	if err != nil {
		return fmt.Errorf("own the downstream topic: %w", err)
	}
	e.goTask("owner", func(ctx context.Context) error {
		if err := e.owner.Run(ctx); err != nil {
			return fmt.Errorf("%w: %w", ErrFenced, err)
		}
		return nil
	})
	e.ready.Met(needEtcd)
	e.watch(needEtcd, func(ctx context.Context) error { return registry.Reachable(ctx, e.etcd) })
	return nil
}

// watch asks a dependency now and then whether it is there, for people to see.
func (e *Engine) watch(name string, ask func(context.Context) error) {
	e.goTask(watchTask+name, func(ctx context.Context) error { return e.dependencies.watch(ctx, name, ask) })
}

// checkAfterPause tells, after a time in which etcd has not confirmed the ownership, whether it was lost
// meanwhile: a process that was stopped for long must not write presence before it knows. While etcd
// does not answer it goes on, for nobody can have taken its place.
func (e *Engine) checkAfterPause(ctx context.Context) error {
	if !e.owner.Lapsed() {
		return nil
	}
	e.lapse.mu.Lock()
	defer e.lapse.mu.Unlock()
	if e.lapse.fenced == nil && time.Since(e.lapse.asked) > lapsedPause {
		err := e.owner.Check(ctx)
		e.lapse.asked = time.Now()
		if errors.Is(err, registry.ErrNotOwner) {
			e.lapse.fenced = fmt.Errorf("presence is not written: %w", err)
			e.fail(fmt.Errorf("%w: %w", ErrFenced, err))
		}
	}
	return e.lapse.fenced
}

// lapsedPause is how long etcd is not asked again when it did not answer.
const lapsedPause = 5 * time.Second

// instance names this process among all that have or had its gateway_id.
func (e *Engine) instance() string { return fmt.Sprintf("%s/%016x", e.adminAddr, e.nonce) }

func (e *Engine) brokerOptions() (broker.Options, error) {
	k := &e.cfg.Kafka
	tlsConfig, err := k.TLS.Client()
	if err != nil {
		return broker.Options{}, fmt.Errorf("kafka.tls: %w", err)
	}
	return broker.Options{
		Brokers: k.Brokers, GatewayID: e.cfg.GatewayID, Nonce: e.nonce, TLS: tlsConfig,
		SASL:          broker.SASL{Mechanism: k.SASL.Mechanism, User: k.SASL.Username, Password: k.SASL.Password},
		UpstreamTopic: k.UpstreamTopic, DownstreamPrefix: k.DownstreamTopicPrefix,
		UndeliveredTopic: k.UndeliveredTopic, DeadletterTopic: k.DeadletterTopic, UserEventsTopic: k.UserEventsTopic,
		MaxInFlightRecords: k.MaxInFlightRecords, MaxInFlightBytes: k.MaxInFlightBytes,
		FlushMessages: k.FlushMessages, FlushBytes: k.FlushBytes, FlushInterval: k.FlushInterval,
		UnavailableAfter: k.AckDeadline, Begin: e.begin, Sampler: e.sampler, Traced: e.tracer.Downstream,
		CreateShared: k.CreateSharedTopics, Strict: k.Strict,
		DownstreamPartitions: k.DownstreamPartitions, DownstreamReplication: k.DownstreamReplication,
		DownstreamRetention: k.DownstreamRetention,
		SharedPartitions:    k.SharedPartitions, SharedReplication: k.SharedReplication,
		Logger: e.log, Registerer: e.metrics,
	}, nil
}

func (e *Engine) startTopics(ctx context.Context) error {
	opts, err := e.brokerOptions()
	if err != nil {
		return err
	}
	admin, err := broker.NewAdmin(opts)
	if err != nil {
		return err
	}
	err = e.await(ctx, needKafka, func(ctx context.Context) error {
		if err := admin.Reachable(ctx); err != nil {
			if errors.Is(err, broker.ErrLogin) {
				return fatalError{err}
			}
			return err
		}
		topicCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		err := admin.EnsureTopics(topicCtx)
		if err == nil || topicCtx.Err() != nil {
			return err
		}
		// Kafka answers: either it went away in this moment, or the topics are not as they must be.
		if admin.Reachable(ctx) != nil {
			return err
		}
		return fatalError{err}
	})
	if err != nil {
		return err
	}
	e.ready.Met(needKafka)
	e.watch(needKafka, admin.Reachable)
	return nil
}

func (e *Engine) startRedis(ctx context.Context) error {
	r := &e.cfg.Redis
	tlsConfig, err := r.TLS.Client()
	if err != nil {
		return fmt.Errorf("redis.tls: %w", err)
	}
	err = e.await(ctx, needRedis, func(ctx context.Context) error {
		if e.redis == nil {
			client, err := registry.DialRedis(registry.RedisOptions{
				Addrs: r.Addrs, Username: r.Username, Password: r.Password,
				SentinelMaster: r.SentinelMaster, SentinelUsername: r.SentinelUsername, SentinelPassword: r.SentinelPassword,
				Cluster: r.Cluster, TLS: tlsConfig,
			})
			if err != nil {
				return err
			}
			e.redis = client
		}
		return registry.RedisReachable(ctx, e.redis)
	})
	if err != nil {
		return err
	}
	e.ready.Met(needRedis)
	e.watch(needRedis, func(ctx context.Context) error { return registry.RedisReachable(ctx, e.redis) })
	return nil
}

// startDenyList reads the deny list before the first token is checked, and follows it.
func (e *Engine) startDenyList(ctx context.Context) error {
	if !e.cfg.Auth.DenyList {
		return nil
	}
	denials := e.denials
	list, err := registry.NewDenyList(registry.DenyListOptions{
		Redis: e.redis, Logger: e.log, Registerer: e.metrics,
		Add: func(d registry.Denial) { denials.Add(transport.Denial(d)) },
		Replace: func(list []registry.Denial) {
			all := make([]transport.Denial, len(list))
			for i, d := range list {
				all[i] = transport.Denial(d)
			}
			denials.Replace(all)
		},
	})
	if err != nil {
		return err
	}
	if err := e.await(ctx, needRedis, list.Load); err != nil {
		return err
	}
	e.goTask("deny list", list.Run)
	return nil
}

// startTracing makes nothing unless there is a collector: what it would make then stays nil.
func (e *Engine) startTracing(context.Context) error {
	c := &e.cfg.Tracing
	if c.Endpoint == "" {
		return nil
	}
	collectorTLS, err := c.TLS.Client()
	if err != nil {
		return fmt.Errorf("tracing.tls: %w", err)
	}
	e.sampler = codec.NewSampler(c.SampleRatio, c.SpansPerSecond)
	scheme := "http"
	if e.cfg.HTTP.TLS.CertFile != "" {
		scheme = "https"
	}
	e.tracer, err = tracing.New(tracing.Options{
		Endpoint: c.Endpoint, TLS: collectorTLS, ServiceName: c.ServiceName, Version: Version(), GatewayID: e.cfg.GatewayID,
		Sampler: e.sampler, UpstreamTopic: e.cfg.Kafka.UpstreamTopic, DownstreamPrefix: e.cfg.Kafka.DownstreamTopicPrefix,
		Scheme: scheme, Logger: e.log, Registerer: e.metrics,
	})
	if err != nil {
		return err
	}
	e.goTask("tracing", e.tracer.Run)
	return nil
}

// startShards makes the parts that know each other, and starts all but the listener.
func (e *Engine) startShards(context.Context) error {
	opts, err := e.brokerOptions()
	if err != nil {
		return err
	}
	e.producer, err = broker.NewProducer(opts, func(b *codec.UpstreamBatch) { e.shards.Results(b) }, e.cfg.Shard.Count)
	if err != nil {
		return err
	}
	peerTLS, err := e.cfg.GRPC.TLS.Client(e.log)
	if err != nil {
		return fmt.Errorf("grpc.tls: %w", err)
	}
	e.peers, err = NewPeers(PeersOptions{
		Lookup: e.gateways.Addr,
		Token:  e.cfg.GRPC.Token, TLS: peerTLS, Logger: e.log, Registerer: e.metrics,
	})
	if err != nil {
		return err
	}
	egress := &lateEgress{}
	e.presence = newPresenceBridge(e.cfg.Shard.Count, e.nonce)
	if err := e.metrics.Register(e.presence); err != nil {
		return fmt.Errorf("register the presence queue's metrics: %w", err)
	}
	w := &e.cfg.WebSocket
	e.shards, err = shard.New(shard.Options{
		Shards: e.cfg.Shard.Count, Loops: e.cfg.HTTP.Loops, GatewayID: e.cfg.GatewayID, Nonce: e.nonce,
		Topic: e.cfg.Kafka.UpstreamTopic, Settings: shardSettings(&e.cfg),
		Heartbeat: w.Heartbeat, RefreshInterval: e.cfg.Redis.RefreshInterval, AckDeadline: e.cfg.Kafka.AckDeadline,
		AckTimeout: w.DeliveryTimeout, DeliveryTimeout: w.DeliveryTimeout, RecentMessages: w.RememberedMessages,
		MaxSessions: sessionPolicy(e.cfg.Sessions.Policy), ReplaceKind: e.cfg.Sessions.OnePerKind,
		Egress: egress, Publisher: e.producer, Presence: e.presence, Events: e.producer,
		Replaced: func(user, gateway, session string) {
			e.peers.Kick(PeerKick{GatewayID: gateway, User: user, Session: session, Reason: "replaced by a newer session"})
		},
		Traced: e.tracer.Upstream,
		Logger: e.log, Registerer: e.metrics,
	})
	if err != nil {
		return err
	}
	e.presence.results = e.shards.PresenceResults
	e.presence.fenced = e.checkAfterPause
	e.presence.store, err = registry.NewPresence(registry.PresenceOptions{
		Client: e.redis, GatewayID: e.cfg.GatewayID, TTL: e.cfg.Redis.PresenceTTL, Registerer: e.metrics,
		MaxSessions: sessionPolicy(e.cfg.Sessions.Policy), ReplaceKind: e.cfg.Sessions.OnePerKind,
	})
	if err != nil {
		return err
	}
	if e.server, err = e.newServer(); err != nil {
		return err
	}
	egress.server = e.server
	e.memory, err = newPressure(e.cfg.Limits.MemoryHighWaterPercent, memoryLimit(), e.server.SetPressure, e.log, e.metrics)
	if err != nil {
		return err
	}
	if e.memory != nil {
		e.goTask("memory", e.memory.run)
	}
	e.goTask("shards", e.shards.Run)
	e.goTask("presence", e.presence.run)
	e.goTask("peers", func(ctx context.Context) error { e.peers.Run(ctx); return nil })
	return nil
}

// newServer makes the public port, with im-logic behind its API.
func (e *Engine) newServer() (*transport.Server, error) {
	logicTLS, err := e.cfg.Logic.TLS.Client()
	if err != nil {
		return nil, fmt.Errorf("logic.tls: %w", err)
	}
	e.logic, err = NewLogic(LogicOptions{
		Target: e.cfg.Logic.Target, TLS: logicTLS, Resolver: registry.NewResolver(e.etcd, e.log), Tracer: e.tracer,
		Registerer: e.metrics,
	})
	if err != nil {
		return nil, err
	}
	messages := &publisher{shards: e.shards, builder: codec.NewBuilder(e.cfg.GatewayID, e.nonce, e.sampler)}
	e.watch(dependencyLogic, func(ctx context.Context) error { return WaitLogic(ctx, e.logic) })
	e.api, err = NewAPI(APIOptions{
		Settings:        apiSettings(&e.cfg),
		Auth:            logicpb.NewAuthServiceClient(e.logic),
		Authenticate:    authenticate(e.verifier.Load),
		Publisher:       messages,
		PublishDeadline: e.cfg.Kafka.AckDeadline + 2*time.Second,
		UpstreamTopic:   e.cfg.Kafka.UpstreamTopic, Tracer: e.tracer, Logger: e.log, Registerer: e.metrics,
	})
	if err != nil {
		return nil, err
	}
	w := &e.cfg.WebSocket
	var certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	if t := &e.cfg.HTTP.TLS; t.CertFile != "" {
		c, err := newCerts(t.CertFile, t.KeyFile, e.log)
		if err != nil {
			return nil, fmt.Errorf("http.tls: %w", err)
		}
		certificate = c.Certificate
		if err := registerCertificate(e.metrics, "http", certificate); err != nil {
			return nil, err
		}
	}
	messages.server, err = transport.New(transport.Options{
		Addr: e.cfg.HTTP.Addr, Loops: e.cfg.HTTP.Loops, GatewayID: e.cfg.GatewayID, Nonce: e.nonce,
		Sink: e.shards, API: e.api, Sampler: e.sampler, Settings: transportSettings(&e.cfg, e.keys.verifier),
		HeadBytes: w.HeadBytes, HandshakeTimeout: w.HandshakeTimeout, Heartbeat: w.Heartbeat,
		HTTPReadTimeout: e.cfg.HTTP.ReadTimeout, HTTPWriteTimeout: e.cfg.HTTP.WriteTimeout, HTTPIdleTimeout: e.cfg.HTTP.IdleTimeout,
		Compression: transport.Compression{Enabled: w.Compression.Enabled, Threshold: w.Compression.ThresholdBytes, Level: w.Compression.Level},
		Certificate: certificate, ProxyProtocol: e.cfg.HTTP.ProxyProtocol, Logger: e.log, Registerer: e.metrics,
	})
	return messages.server, err
}

// startKafka connects the producer and joins the consumer's group; nothing is fetched yet.
func (e *Engine) startKafka(ctx context.Context) error {
	opts, err := e.brokerOptions()
	if err != nil {
		return err
	}
	e.goTask("kafka producer", e.producer.Run)
	e.ready.Waiting(needClients, "connecting the producer")
	if err := e.until(ctx, e.producer.Ready()); err != nil {
		return fmt.Errorf("connect the producer: %w", err)
	}
	opts.Locate, opts.Alive = locate(e.presence.store), e.gateways.Owned
	admin, err := broker.NewAdmin(opts)
	if err != nil {
		return err
	}
	e.consumer, err = broker.NewConsumer(opts, e.producer, e.cfg.Shard.Count, e.shards.Deliver, func(ctx context.Context) error {
		if err := checkOwner(ctx, e.owner); err != nil {
			return err
		}
		return admin.EnsureOwn(ctx)
	})
	if err != nil {
		return err
	}
	e.goTask("kafka consumer", func(ctx context.Context) error {
		err := e.consumer.Run(ctx)
		if errors.Is(err, broker.ErrFenced) {
			return fmt.Errorf("%w: %w", ErrFenced, err)
		}
		return err
	})
	e.ready.Waiting(needClients, "joining the consumer group")
	if err := e.until(ctx, e.consumer.Ready()); err != nil {
		return fmt.Errorf("join the consumer group: %w", err)
	}
	e.ready.Met(needClients)
	return nil
}

// until waits for c, unless a task fails or ctx ends first.
func (e *Engine) until(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case err := <-e.failed:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *Engine) startListener(ctx context.Context) error {
	grpcTLS, err := e.cfg.GRPC.TLS.Server(e.log)
	if err != nil {
		return fmt.Errorf("grpc.tls: %w", err)
	}
	if grpcTLS != nil {
		if err := registerCertificate(e.metrics, "grpc", grpcTLS.GetCertificate); err != nil {
			return err
		}
	}
	held := &sessions{Set: e.shards, connections: e.server.Connections, draining: e.draining.Load}
	e.operator.serve(operatorParts{sessions: held, measure: e.shards.Measure, locate: e.presence.store.Locate})
	e.grpc, err = NewGRPCServer(GRPCOptions{
		Addr: e.cfg.GRPC.Addr, Token: e.cfg.GRPC.Token, TLS: grpcTLS, GatewayID: e.cfg.GatewayID, Version: Version(),
		Sessions: held, Operator: e.operator, Acting: e.acting, Tracer: e.tracer,
		Logger: e.log, Registerer: e.metrics,
	})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", e.cfg.GRPC.Addr)
	if err != nil {
		return fmt.Errorf("gRPC port (grpc.addr): %w", err)
	}
	grpcAddr, err := AdvertiseAddr(e.cfg.GRPC.AdvertiseAddr, ln.Addr())
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	e.goTask("grpc", func(ctx context.Context) error { return e.grpc.Run(ctx, ln) })
	if err := e.server.Start(ctx); err != nil {
		return fmt.Errorf("public port (http.addr): %w", err)
	}
	e.httpAddr = e.server.Addr()
	close(e.publicUp)
	e.goTask("public port", func(ctx context.Context) error {
		select {
		case <-e.server.Done():
			return e.server.Err()
		case <-ctx.Done():
			return nil
		}
	})
	e.ready.Met(needListener)
	// A restart's backlog finds its users back.
	e.goTask("start grace", func(ctx context.Context) error {
		grace := time.NewTimer(e.cfg.Kafka.StartGrace)
		defer grace.Stop()
		select {
		case <-grace.C:
			close(e.begin)
		case <-ctx.Done():
		}
		return nil
	})
	e.registration, err = registry.NewRegistration(registry.RegistrationOptions{
		Client: e.etcd, LeaseTTL: e.cfg.Etcd.LeaseTTL, Logger: e.log, Registerer: e.metrics,
		Endpoint: registry.Endpoint{
			GatewayID: e.cfg.GatewayID, GRPCAddr: grpcAddr, HTTPAddr: e.httpAddr.String(),
			Version: Version(), StartedAt: e.started.UnixMilli(),
		},
	})
	return err
}

func (e *Engine) startRegistration(ctx context.Context) error {
	e.goTask(taskRegistration, func(ctx context.Context) error { e.registration.Run(ctx); return nil })
	e.ready.Waiting(needRegistry, "registering in etcd")
	if err := e.until(ctx, e.registration.Registered()); err != nil {
		return fmt.Errorf("register in etcd: %w", err)
	}
	e.grpc.SetServing(true)
	opts, err := e.brokerOptions()
	if err != nil {
		return err
	}
	admin, err := broker.NewAdmin(opts)
	if err != nil {
		return err
	}
	t := &e.cfg.Takeover
	takeover, err := NewTakeover(TakeoverOptions{
		Etcd: e.etcd, Consumer: e.consumer, Admin: admin, GatewayID: e.cfg.GatewayID, Instance: e.instance(),
		LeaseTTL: e.cfg.Etcd.LeaseTTL, After: t.After, Quiet: t.Quiet, MaxTopics: t.MaxTopics,
		Logger: e.log, Registerer: e.metrics,
	})
	if err != nil {
		return err
	}
	e.goTask(taskTakeover, func(ctx context.Context) error { takeover.Run(ctx); return nil })
	e.ready.Met(needRegistry)
	return nil
}
