package shard

import (
	"im-gateway/codec"
)

// maxPendingOps bounds the presence operations that wait in a shard while Redis is away. Beyond it
// refreshes and releases are dropped and counted: an entry that is not released expires by itself.
const maxPendingOps = 1 << 16

func (s *shard) presenceOp(kind PresenceKind, ses *session) {
	if len(s.ops) >= maxPendingOps {
		s.metrics.presenceDropped.Inc()
		return
	}
	if kind != Release {
		ses.presence = true
	}
	dev := s.deviceOf(ses)
	s.ops = append(s.ops, PresenceOp{
		Kind: kind, User: ses.user, Session: ses.id, Version: ses.version, ConnectedAt: ses.connectedAt,
		DeviceID: dev.id, Device: dev.kind,
	})
}

func (s *shard) claimPresence(ses *session) { s.presenceOp(Claim, ses) }

// refreshPresence refreshes the session's entry, or claims it when the claim has not succeeded yet.
func (s *shard) refreshPresence(ses *session) {
	switch {
	case ses.presence: // the last operation is still waiting for Redis
		s.metrics.presenceSkipped.Inc()
	case ses.version == 0:
		s.presenceOp(Claim, ses)
	default:
		s.presenceOp(Refresh, ses)
	}
}

func (s *shard) releasePresence(ses *session) {
	if !ses.superseded {
		s.presenceOp(Release, ses)
	}
}

func (s *shard) flushPresence() {
	if len(s.ops) == 0 {
		return
	}
	n := len(s.ops)
	if !s.opts.Presence.Submit(s.index, s.ops) {
		s.metrics.presenceFull.Inc()
		s.asking.Store(int64(s.outstanding + n))
		return // offered again at the next round, a tick away at the most
	}
	s.outstanding += n
	s.asking.Store(int64(s.outstanding))
	s.ops = make([]PresenceOp, 0, min(n, maxKeptNotes)) // the next tick is likely to have as many
}

func (s *shard) onPresence(results []PresenceResult) {
	s.outstanding -= len(results)
	s.asking.Store(int64(s.outstanding + len(s.ops)))
	s.forEach(len(results), func(i int) {
		r := &results[i]
		s.current = r.Session
		if r.Kind == Release {
			return
		}
		ses := s.lookup(r.Session)
		if ses != nil {
			ses.presence = false
		}
		switch r.Kind {
		case Claim:
			s.onClaim(ses, r)
		case Refresh:
			s.onRefreshed(ses, r)
		}
	}, nil)
}

func (s *shard) onClaim(ses *session, r *PresenceResult) {
	if r.Err != nil {
		return // `connected` goes out after the claim timeout, the claim is tried again
	}
	if ses == nil || ses.state == closing {
		// The release went out before the claim had its version, yet it names the session: nothing
		// is left behind.
		return
	}
	if r.Superseded {
		ses.superseded = true
		s.close(ses, codec.CloseReplaced, replacedReason)
		return
	}
	if ses.version == 0 && r.Version != 0 {
		s.absent.Add(-1)
	}
	ses.version = r.Version
	if ses.state == claiming {
		s.goLive(ses, false)
	}
	ses.elsewhere = r.Elsewhere
	for _, e := range r.Evicted {
		if e.Gateway != s.opts.GatewayID {
			s.opts.Replaced(ses.user, e.Gateway, e.Session)
			continue
		}
		// A session of this process that lives on; one of a process before it has another nonce.
		id, ok := codec.ParseSessionName(e.Session, s.opts.Nonce)
		if prev := s.lookup(id); ok && prev != nil && prev != ses && prev.state != closing {
			prev.superseded = true
			s.close(prev, codec.CloseReplaced, replacedReason)
		}
	}
}

func (s *shard) onRefreshed(ses *session, r *PresenceResult) {
	if ses == nil || ses.state == closing || r.Err != nil {
		return
	}
	if r.Superseded {
		ses.superseded = true
		s.close(ses, codec.CloseReplaced, replacedReason)
		return
	}
	ses.elsewhere = r.Elsewhere
}
