package engine

import (
	"context"
	"errors"
	"time"

	"im-gateway/codec"
)

// The tasks that a stop ends by name before the others.
const (
	taskRegistration = "registration"
	taskTakeover     = "takeover"
	watchTask        = "watch " // and the dependency's name
)

// ackShare is the part of the time left that acks in flight may take: Kafka may be away, and the
// sessions must still be closed in time.
const ackShare = 3

// stop drains and stops what start has started, in order, within drain.deadline. After a failure
// clients are not asked to leave at leisure: they are closed at once.
func (e *Engine) stop(failure error) {
	began := time.Now()
	e.mu.Lock()
	e.stopping = true // no reload from here on
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(e.hard, e.config().Drain.Deadline)
	defer cancel()
	e.draining.Store(true)
	e.ready.Drain("stopping")
	if e.grpc != nil {
		e.grpc.SetServing(false)
	}
	e.task(taskRegistration).end(ctx)
	if e.server != nil {
		e.server.StopAccepting()
	}
	e.task(taskTakeover).end(ctx)
	if e.httpAddr != nil {
		e.drainSessions(ctx, failure)
	}
	if e.producer != nil {
		e.closeProducer(ctx)
	}
	if e.httpAddr != nil {
		if err := e.server.Shutdown(ctx); err != nil {
			e.log.Warn().Err(err).Msg("public port not stopped in order")
		}
	}
	for _, name := range []string{"grpc", "public port", "start grace", "kafka consumer", "kafka producer", "peers", "presence", "reloads", "deny list", "memory", "shards", "tracing", "gateways", "owner"} {
		e.task(name).end(ctx)
	}
	for _, t := range e.keyTasks { // nobody adds to them any more
		t.end(ctx)
	}
	for _, d := range e.dependencies.states() {
		e.task(watchTask + d.Name).end(ctx) // nobody asks what is closed next
	}
	e.release(ctx)
	e.task("admin").end(ctx)
	e.account(began)
}

func (e *Engine) task(name string) *task {
	for _, t := range e.tasks {
		if t.name == name {
			return t
		}
	}
	return nil
}

// drainSessions asks the clients to go, settles what is in flight and closes the sessions.
func (e *Engine) drainSessions(ctx context.Context, failure error) {
	window := e.config().Drain.Window
	if failure != nil {
		window = 0
	}
	e.log.Info().Int64("sessions", e.shards.Stats().Sessions).Dur("window_ms", window).Msg("draining")
	// The consumer reads no further while the sessions close: the rest waits in Kafka. One that was
	// fenced stops first.
	stopped := make(chan error, 1)
	stopConsumer := func() {
		stopCtx, cancel := context.WithTimeout(ctx, e.left(ctx)*2/ackShare)
		defer cancel()
		stopped <- e.consumer.Stop(stopCtx)
	}
	fenced := errors.Is(failure, ErrFenced)
	if fenced {
		go stopConsumer()
	}
	e.step("clients told to reconnect", e.shards.Drain(ctx, window, "draining"))
	ackCtx, cancel := context.WithTimeout(ctx, e.left(ctx)/ackShare)
	e.step("acks in flight settled", e.shards.AwaitInFlight(ackCtx))
	cancel()
	if !fenced {
		go stopConsumer()
	}
	closeCtx, closeCancel := context.WithTimeout(ctx, e.left(ctx)/2)
	e.step("sessions closed and presence deleted", e.shards.CloseAll(closeCtx, codec.CloseDraining, "draining"))
	closeCancel()
	e.step("downstream settled and committed", <-stopped)
}

// closeProducer leaves time for what comes after it.
func (e *Engine) closeProducer(ctx context.Context) {
	closeCtx, cancel := context.WithTimeout(ctx, e.left(ctx)/ackShare)
	defer cancel()
	t := e.task("kafka producer")
	if t == nil {
		return // never started: nothing is in it
	}
	e.step("producer closed", e.producer.Close(closeCtx))
}

func (e *Engine) left(ctx context.Context) time.Duration {
	deadline, _ := ctx.Deadline()
	return max(0, time.Until(deadline))
}

func (e *Engine) step(what string, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		e.log.Warn().Err(err).Msg("not in time: " + what)
	}
}

// release gives up the owner's key, the last step that others wait for, and closes the clients.
func (e *Engine) release(ctx context.Context) {
	if e.owner != nil {
		ownerCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		e.step("owner's key given up", e.owner.Release(ownerCtx))
		cancel()
	}
	if e.logic != nil {
		e.step("connection to im-logic closed", e.logic.Close())
	}
	if e.redis != nil {
		e.redis.Close()
	}
	if e.etcd != nil {
		e.step("connection to etcd closed", e.etcd.Close())
	}
}

// account logs what became of everything.
func (e *Engine) account(began time.Time) {
	event := e.log.Info().Dur("took_ms", time.Since(began))
	if e.shards != nil {
		st := e.shards.Stats()
		event = event.Int64("sessions_left", st.Sessions).Interface("refused", st.Refused)
	}
	if l, err := ReadLedger(e.metrics); err == nil {
		event = event.Interface("upstream", l.Upstream).Interface("downstream", l.Downstream)
	}
	event.Msg("drained and stopped")
}
