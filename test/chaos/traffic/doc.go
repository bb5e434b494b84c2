// Package traffic is the traffic of the fault suite and the record of what its clients saw: users
// over WebSocket who send numbered messages, a sender who writes numbered records for them to the
// gateways' topics, and clients who misbehave. It shares no code with the gateway: it speaks the
// protocol as documented, so that a mistake on one side does not hide one on the other.
package traffic
