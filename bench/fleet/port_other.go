//go:build !linux

package fleet

import "syscall"

// latePort does nothing: only Linux can choose a port so late. A source address has then one range of
// ports for all its connections.
func latePort(_, _ string, _ syscall.RawConn) error { return nil }
