package engine

import (
	"cmp"

	"im-gateway/shard"
	"im-gateway/transport"
)

// What of a configuration the parts can take while they run.

func shardSettings(c *Config) shard.Settings {
	w, lim := &c.WebSocket, &c.Limits
	return shard.Settings{
		EgressBudget: w.EgressBudgetBytes, NodeEgressBudget: w.NodeEgressBudgetBytes, MaxMessageBytes: w.MaxMessageBytes,
		UserMessagesPerSecond: lim.UserMessagesPerSecond, UserBytesPerSecond: lim.UserBytesPerSecond,
		MaxSessionInFlight: cmp.Or(lim.UnackedMessages, shard.MaxSessionInFlight),
		CloseRate:          c.Drain.CloseRate,
	}
}

func transportSettings(c *Config, v *transport.Verifier) transport.Settings {
	h, w, lim := &c.HTTP, &c.WebSocket, &c.Limits
	return transport.Settings{
		Verifier: v, RefuseQueryToken: !c.Auth.QueryToken, AllowedOrigins: w.AllowedOrigins,
		MaxMessageBytes: w.MaxMessageBytes, MaxFragments: w.MaxFragments, HeartbeatTimeout: w.HeartbeatTimeout,
		EgressBudget: w.EgressBudgetBytes, MaxConnections: w.MaxConnections,
		MaxHTTPConnections: h.MaxConnections, MaxTLSHandshakes: h.TLS.MaxHandshakes,
		ExemptNetworks:   networks(lim.ExemptNetworks),
		ConnectionsPerIP: lim.ConnectionsPerIP, ConnectionsPerSubnet: lim.ConnectionsPerSubnet,
		HandshakesInFlight: lim.HandshakesInFlight, HandshakesPerSecond: lim.HandshakesPerSecond,
		MessagesPerSecond: lim.MessagesPerSecond, BytesPerSecond: lim.BytesPerSecond,
		TrustedProxies: networks(h.TrustedProxies), ForwardedHeader: h.ForwardedHeader,
	}
}

func apiSettings(c *Config) APISettings {
	return APISettings{
		AuthDeadline: c.Logic.Deadline, MaxMessageBytes: c.WebSocket.MaxMessageBytes,
		MaxBodyBytes: c.HTTP.MaxBodyBytes, MaxRequests: c.HTTP.MaxRequests,
		Logins:  LoginLimits{PerIP: c.Limits.LoginsPerIP, PerName: c.Limits.LoginsPerName},
		Origins: c.HTTP.CORSOrigins,
	}
}
