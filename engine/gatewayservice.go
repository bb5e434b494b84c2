package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/oklog/ulid/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"im-gateway/codec"
	"im-gateway/codec/gatewaypb"
)

// Limits on the requests of GatewayService.
const (
	maxPushTargets = codec.MaxTargets
	maxName        = codec.MaxNameLen
	maxKickReason  = 100 // bytes

	// expirySkew is the difference between the clocks that is tolerated in expire_at.
	expirySkew = 5 * time.Second
)

// defaultType is the type of a frame that carries a record without one.
const defaultType = "new-message"

// kickType is the type of a record that closes sessions.
const kickType = "kick"

// Sessions is what the gRPC server acts on. All methods may be called from any goroutine.
type Sessions interface {
	// Push delivers a record, which must not be changed after, and returns how it ended for each of
	// its targets, in their order. An error means that the ends are not known.
	Push(ctx context.Context, record *codec.Downstream) ([]codec.End, error)
	// Kick closes the session named, or all of the user's when session is empty, and returns how many.
	Kick(ctx context.Context, user, session string, replaced bool, reason string) (int, error)
	// Sessions returns the user's sessions.
	Sessions(ctx context.Context, user string) ([]SessionInfo, error)
	// Stats returns the gateway's counters.
	Stats() Stats
}

// SessionInfo describes one session.
type SessionInfo struct {
	Name         string
	DeviceID     string
	Device       string
	ConnectedAt  int64 // Unix ms
	MessagesIn   int64
	MessagesOut  int64
	PendingBytes int64
	State        string
}

// Stats are the gateway's counters, which count from its start, and gauges.
type Stats struct {
	Connections      int64
	Sessions         int64
	Users            int64
	UpstreamInFlight int64
	Downstream       map[string]int64 // ends by name
	Refused          map[string]int64 // client messages by code
	Draining         bool
}

// gatewayService implements gatewaypb.GatewayServiceServer.
type gatewayService struct {
	gatewaypb.UnimplementedGatewayServiceServer
	sessions  Sessions
	gatewayID string
	version   string
	startedAt int64
}

func newGatewayService(o GRPCOptions) *gatewayService {
	return &gatewayService{
		sessions:  o.Sessions,
		gatewayID: o.GatewayID,
		version:   o.Version,
		startedAt: time.Now().UnixMilli(),
	}
}

// Push implements GatewayService.
func (s *gatewayService) Push(ctx context.Context, r *gatewaypb.PushRequest) (*gatewaypb.PushResponse, error) {
	if err := checkPush(r); err != nil {
		return nil, err
	}
	now := time.Now()
	record := &codec.Downstream{
		Targets:   r.GetTargetUserIds(),
		Type:      r.GetType(),
		MessageID: r.GetMessageId(),
		Data:      r.GetData(),
		ExpireAt:  r.GetExpireAt(),
		DeviceID:  r.GetDeviceId(),
	}
	if record.Type == "" {
		record.Type = defaultType
	}
	if record.MessageID == "" {
		record.MessageID = ulid.Make().String()
	}
	answer := &gatewaypb.PushResponse{Results: make([]*gatewaypb.PushResult, len(record.Targets))}
	for i, user := range record.Targets {
		answer.Results[i] = &gatewaypb.PushResult{UserId: user, Outcome: gatewaypb.PushResult_OUTCOME_EXPIRED}
	}
	if at := r.GetExpireAt(); at != 0 && now.Add(-expirySkew).UnixMilli() > at {
		return answer, nil
	}
	record.Encode(now.UnixMilli())
	ends, err := s.sessions.Push(ctx, record)
	if err != nil {
		return nil, callError("push", err)
	}
	for i, end := range ends {
		answer.Results[i].Outcome = pushOutcome(end)
	}
	return answer, nil
}

func checkPush(r *gatewaypb.PushRequest) error {
	n := len(r.GetTargetUserIds())
	if n < 1 || n > maxPushTargets {
		return invalid("target_user_ids: %d users, 1 to %d are allowed", n, maxPushTargets)
	}
	for i, user := range r.GetTargetUserIds() {
		if !codec.ValidName(user) {
			return invalid("target_user_ids[%d]: not a user id (1 to %d bytes, no control characters)", i, maxName)
		}
	}
	switch t := r.GetType(); {
	case t == kickType:
		return invalid("type kick: use Kick")
	case t != "" && (len(t) > codec.MaxTypeLen || !codec.ValidName(t)):
		return invalid("type: 1 to %d bytes, no control characters", codec.MaxTypeLen)
	}
	if id := r.GetMessageId(); id != "" && !codec.ValidName(id) {
		return invalid("message_id: 1 to %d bytes, no control characters", maxName)
	}
	if id := r.GetDeviceId(); id != "" && !codec.ValidName(id) {
		return invalid("device_id: 1 to %d bytes, no control characters", maxName)
	}
	if !json.Valid(r.GetData()) || !utf8.Valid(r.GetData()) {
		return invalid("data: not valid JSON in UTF-8")
	}
	return nil
}

func pushOutcome(e codec.End) gatewaypb.PushResult_Outcome {
	switch e {
	case codec.EndDelivered:
		return gatewaypb.PushResult_OUTCOME_DELIVERED
	case codec.EndSlowConsumer:
		return gatewaypb.PushResult_OUTCOME_SLOW_CONSUMER
	case codec.EndExpired:
		return gatewaypb.PushResult_OUTCOME_EXPIRED
	case codec.EndUnacked:
		return gatewaypb.PushResult_OUTCOME_UNACKED
	}
	return gatewaypb.PushResult_OUTCOME_OFFLINE // offline, moved, or the session ended meanwhile
}

// Kick implements GatewayService.
func (s *gatewayService) Kick(ctx context.Context, r *gatewaypb.KickRequest) (*gatewaypb.KickResponse, error) {
	n, err := kick(ctx, s.sessions, r)
	if err != nil {
		return nil, err
	}
	return &gatewaypb.KickResponse{Closed: n}, nil
}

// kick closes sessions and returns how many.
func kick(ctx context.Context, from Sessions, r *gatewaypb.KickRequest) (int32, error) {
	if !codec.ValidName(r.GetUserId()) {
		return 0, invalidUser()
	}
	if len(r.GetReason()) > maxKickReason {
		return 0, invalid("reason: %d bytes, at most %d are allowed", len(r.GetReason()), maxKickReason)
	}
	n, err := from.Kick(ctx, r.GetUserId(), r.GetSessionId(), r.GetReplaced(), r.GetReason())
	if err != nil {
		return 0, callError("kick", err)
	}
	return int32(n), nil //nolint:gosec // sessions of one user
}

// GetSession implements GatewayService.
func (s *gatewayService) GetSession(ctx context.Context, r *gatewaypb.GetSessionRequest) (*gatewaypb.GetSessionResponse, error) {
	if !codec.ValidName(r.GetUserId()) {
		return nil, invalidUser()
	}
	list, err := sessionsOf(ctx, s.sessions, r.GetUserId())
	if err != nil {
		return nil, err
	}
	return &gatewaypb.GetSessionResponse{GatewayId: s.gatewayID, Sessions: list}, nil
}

// sessionsOf describes a user's sessions.
func sessionsOf(ctx context.Context, from Sessions, user string) ([]*gatewaypb.Session, error) {
	found, err := from.Sessions(ctx, user)
	if err != nil {
		return nil, callError("get sessions", err)
	}
	var list []*gatewaypb.Session
	for _, i := range found {
		list = append(list, &gatewaypb.Session{
			SessionId:    i.Name,
			ConnectedAt:  i.ConnectedAt,
			MessagesIn:   i.MessagesIn,
			MessagesOut:  i.MessagesOut,
			PendingBytes: i.PendingBytes,
			State:        i.State,
			DeviceId:     i.DeviceID,
			Device:       i.Device,
		})
	}
	return list, nil
}

// Stats implements GatewayService.
func (s *gatewayService) Stats(context.Context, *gatewaypb.StatsRequest) (*gatewaypb.StatsResponse, error) {
	n := s.sessions.Stats()
	return &gatewaypb.StatsResponse{
		GatewayId:        s.gatewayID,
		Version:          s.version,
		StartedAt:        s.startedAt,
		Connections:      n.Connections,
		Sessions:         n.Sessions,
		Users:            n.Users,
		UpstreamInFlight: n.UpstreamInFlight,
		Downstream:       n.Downstream,
		Refused:          n.Refused,
		Draining:         n.Draining,
	}, nil
}

func invalidUser() error { return invalid("user_id: 1 to %d bytes, no control characters", maxName) }

func invalid(format string, args ...any) error {
	return status.Error(codes.InvalidArgument, fmt.Sprintf(format, args...))
}

// callError turns an error of Sessions' into a status.
func callError(what string, err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, what+": "+err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, what+": "+err.Error())
	}
	return status.Error(codes.Unavailable, what+": "+err.Error())
}
