package engine

import (
	"cmp"
	"context"
	"math"
	"runtime/metrics"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"im-gateway/codec"
	"im-gateway/codec/gatewaypb"
	"im-gateway/registry"
	"im-gateway/shard"
)

// Limits on the requests of AdminService.
const (
	defaultTalkers = 10
	maxTalkers     = 100

	defaultTalkWindow = 3 * time.Second
	minTalkWindow     = 100 * time.Millisecond
	maxTalkWindow     = 30 * time.Second

	// findPatience is how long Redis may take to say where a user is.
	findPatience = 2 * time.Second
)

// OperatorOptions configure an Operator.
type OperatorOptions struct {
	Config       func() *Config // the one in force
	Version      string
	Started      time.Time
	Readiness    *Readiness
	Dependencies *dependencies
	Metrics      prometheus.Gatherer
	Drain        func() // begins to drain; must not block
	Logger       zerolog.Logger
}

// Operator is what operators see of the gateway and do to it: AdminService, which the gRPC port and the
// admin page offer alike. Who asks may do so is for them to check. All methods may be called from any
// goroutine, at any time; their errors are gRPC's.
type Operator struct {
	gatewaypb.UnimplementedAdminServiceServer
	o     OperatorOptions
	parts atomic.Pointer[operatorParts] // nil until the start has got there
}

var _ gatewaypb.AdminServiceServer = (*Operator)(nil)

// operatorParts are the parts of a gateway that has sessions.
type operatorParts struct {
	sessions Sessions
	measure  func(context.Context, time.Duration) (shard.Talks, error)
	locate   func(context.Context, []string) []registry.Located
}

// NewOperator returns an Operator without sessions yet.
func NewOperator(o OperatorOptions) *Operator { return &Operator{o: o} }

// serve gives it the sessions to act on.
func (p *Operator) serve(parts operatorParts) { p.parts.Store(&parts) }

// started returns the parts, or an error while there are none.
func (p *Operator) started() (*operatorParts, error) {
	if parts := p.parts.Load(); parts != nil {
		return parts, nil
	}
	return nil, status.Error(codes.Unavailable, "the gateway is starting and has no sessions yet")
}

// Status implements AdminService.
func (p *Operator) Status(context.Context, *gatewaypb.StatusRequest) (*gatewaypb.StatusResponse, error) {
	r, err := read(p.o.Metrics)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	c := p.o.Config()
	s := &gatewaypb.StatusResponse{
		GatewayId: c.GatewayID, Version: p.o.Version,
		StartedAt: p.o.Started.UnixMilli(), Now: time.Now().UnixMilli(),
		State: "ready", LogLevel: LogLevel{}.String(), Acting: c.Admin.Token != "",
		MemoryBytes: memoryHeld(),
	}
	if limit := memoryLimit(); limit != math.MaxInt64 {
		s.MemoryLimitBytes = limit
	}
	for _, c := range p.o.Readiness.Missing() {
		switch {
		case c.Name == drainCondition:
			s.State = "draining"
			continue
		case s.State == "ready":
			s.State = "starting"
		}
		s.Missing = append(s.Missing, &gatewaypb.Condition{Name: c.Name, Reason: c.Reason})
	}
	for _, d := range p.o.Dependencies.states() {
		s.Dependencies = append(s.Dependencies, &gatewaypb.Dependency{
			Name: d.Name, State: d.State, Since: d.Since.UnixMilli(), Error: d.Error,
		})
	}
	s.ConnectionsBound, _ = r.sum(series{name: "im_gateway_transport_connections_bound"})
	if parts := p.parts.Load(); parts != nil {
		st := parts.sessions.Stats()
		s.Connections, s.Sessions, s.Users, s.UpstreamInFlight = st.Connections, st.Sessions, st.Users, st.UpstreamInFlight
	}
	return s, nil
}

// memoryHeld is how much of the machine's memory the runtime holds, in bytes.
func memoryHeld() int64 {
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	return int64(samples[0].Value.Uint64()) - int64(samples[1].Value.Uint64())
}

// Ledger implements AdminService.
func (p *Operator) Ledger(context.Context, *gatewaypb.LedgerRequest) (*gatewaypb.LedgerResponse, error) {
	l, err := ReadLedger(p.o.Metrics)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	side := func(a Account) *gatewaypb.Account {
		return &gatewaypb.Account{In: a.In, Ends: a.Ends, Open: a.Open, Balanced: a.Balanced}
	}
	return &gatewaypb.LedgerResponse{Downstream: side(l.Downstream), Upstream: side(l.Upstream)}, nil
}

// Queues implements AdminService.
func (p *Operator) Queues(context.Context, *gatewaypb.QueuesRequest) (*gatewaypb.QueuesResponse, error) {
	r, err := read(p.o.Metrics)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	answer := &gatewaypb.QueuesResponse{}
	for _, q := range queues() {
		answer.Queues = append(answer.Queues, q.state(r))
	}
	return answer, nil
}

// TopTalkers implements AdminService.
func (p *Operator) TopTalkers(ctx context.Context, r *gatewaypb.TopTalkersRequest) (*gatewaypb.TopTalkersResponse, error) {
	limit := cmp.Or(int(r.GetLimit()), defaultTalkers)
	if limit < 1 || limit > maxTalkers {
		return nil, invalid("limit: %d, must be 1 to %d", limit, maxTalkers)
	}
	window := cmp.Or(time.Duration(r.GetWindowMs())*time.Millisecond, defaultTalkWindow)
	if window < minTalkWindow || window > maxTalkWindow {
		return nil, invalid("window_ms: %d, must be %d to %d", window.Milliseconds(), minTalkWindow.Milliseconds(), maxTalkWindow.Milliseconds())
	}
	parts, err := p.started()
	if err != nil {
		return nil, err
	}
	talks, err := parts.measure(ctx, window)
	if err != nil {
		return nil, callError("measure", err)
	}
	list := func(figure func(*shard.Talk) int64) []*gatewaypb.Talker {
		var list []*gatewaypb.Talker
		for _, t := range talks.Top(limit, figure) {
			list = append(list, &gatewaypb.Talker{
				UserId: t.User, MessagesIn: t.In, BytesIn: t.BytesIn, MessagesOut: t.Out, BytesOut: t.BytesOut,
			})
		}
		return list
	}
	return &gatewaypb.TopTalkersResponse{
		WindowMs:  talks.Window.Milliseconds(),
		Senders:   list(func(t *shard.Talk) int64 { return t.In }),
		Receivers: list(func(t *shard.Talk) int64 { return t.Out }),
		Users:     int64(len(talks.Users)), Missed: talks.Missed,
	}, nil
}

// FindUser implements AdminService.
func (p *Operator) FindUser(ctx context.Context, r *gatewaypb.FindUserRequest) (*gatewaypb.FindUserResponse, error) {
	user := r.GetUserId()
	if !codec.ValidName(user) {
		return nil, invalidUser()
	}
	parts, err := p.started()
	if err != nil {
		return nil, err
	}
	here := p.o.Config().GatewayID
	answer := &gatewaypb.FindUserResponse{GatewayId: here, UserId: user}
	if answer.Sessions, err = sessionsOf(ctx, parts.sessions, user); err != nil {
		return nil, err
	}
	findCtx, cancel := context.WithTimeout(ctx, findPatience)
	defer cancel()
	found := parts.locate(findCtx, []string{user})[0]
	if found.Err != nil {
		answer.ElsewhereError = found.Err.Error()
	}
	for _, at := range found.Sessions {
		if at.GatewayID != here {
			answer.Elsewhere = append(answer.Elsewhere, &gatewaypb.Place{
				GatewayId: at.GatewayID, SessionId: at.Session, ConnectedAt: at.ConnectedAt,
				DeviceId: at.DeviceID, Device: at.DeviceKind,
			})
		}
	}
	return answer, nil
}

// acted begins the log line of an act.
func (p *Operator) acted() *zerolog.Event { return always(p.o.Logger) }

// KickUser implements AdminService.
func (p *Operator) KickUser(ctx context.Context, r *gatewaypb.KickUserRequest) (*gatewaypb.KickUserResponse, error) {
	parts, err := p.started()
	if err != nil {
		return nil, err
	}
	n, err := kick(ctx, parts.sessions, &gatewaypb.KickRequest{
		UserId: r.GetUserId(), SessionId: r.GetSessionId(), Reason: r.GetReason(),
	})
	if err != nil {
		return nil, err
	}
	p.acted().Str("user_id", r.GetUserId()).Str("session_id", r.GetSessionId()).Str("reason", r.GetReason()).
		Int32("closed", n).Msg("an operator has kicked a user")
	return &gatewaypb.KickUserResponse{Closed: n}, nil
}

// Drain implements AdminService.
func (p *Operator) Drain(context.Context, *gatewaypb.DrainRequest) (*gatewaypb.DrainResponse, error) {
	p.acted().Msg("an operator has asked for a drain")
	p.o.Drain()
	return &gatewaypb.DrainResponse{}, nil
}

// GetLogLevel implements AdminService.
func (p *Operator) GetLogLevel(context.Context, *gatewaypb.GetLogLevelRequest) (*gatewaypb.LogLevelResponse, error) {
	return &gatewaypb.LogLevelResponse{Level: LogLevel{}.String()}, nil
}

// SetLogLevel implements AdminService.
func (p *Operator) SetLogLevel(_ context.Context, r *gatewaypb.SetLogLevelRequest) (*gatewaypb.LogLevelResponse, error) {
	before := LogLevel{}.String()
	if err := (LogLevel{}).Set(r.GetLevel()); err != nil {
		return nil, invalid("level: %v", err)
	}
	p.acted().Str("from", before).Str("to", r.GetLevel()).Msg("an operator has changed the log level")
	return &gatewaypb.LogLevelResponse{Level: r.GetLevel()}, nil
}
